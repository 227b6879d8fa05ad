"""A tracker that fails: said once, left out, and closed all the same."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lora_exp.config import CONF_DIR
from lora_exp.tracking import wandb as room
from lora_exp.tracking.base import ActiveRun, Ending, Guarded
from lora_exp.tracking.wandb import ASK_AGAIN, Wandb


class Breaking(ActiveRun):
    """A run at a tracker that breaks at one call, and at every later one if it is to stay broken."""

    later = "later: carry it there"

    def __init__(self, at: str, closes: bool = True) -> None:
        self.at = at
        self.closes = closes
        self.calls: list[str] = []

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.at or (name == "finish" and not self.closes):
            raise ConnectionError(f"{name}\n  broke")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._called("log")

    def summarize(self, summary: Mapping[str, Any]) -> None:
        self._called("summarize")

    def adapter(self, folder: Path) -> None:
        self._called("adapter")

    def finish(self, status: Ending) -> None:
        self._called("finish")


def used(run: Breaking) -> Guarded:
    guarded = Guarded(run, "far")
    guarded.log({"loss": 1.0}, 1)
    guarded.summarize({"loss": 1.0})
    guarded.adapter(Path("adapter"))
    guarded.finish("finished")
    return guarded


@pytest.mark.parametrize(
    ("at", "calls"),
    [
        ("log", ["log", "finish"]),
        ("summarize", ["log", "summarize", "finish"]),
        ("adapter", ["log", "summarize", "adapter", "finish"]),
        ("finish", ["log", "summarize", "adapter", "finish"]),
        ("nothing", ["log", "summarize", "adapter", "finish"]),
    ],
)
def test_after_a_failure_a_run_is_only_closed(at: str, calls: list[str]) -> None:
    run = Breaking(at)
    guarded = used(run)
    assert run.calls == calls
    said = f"far failed and is left out from here on: {at} broke; later: carry it there"
    assert guarded.failure == (None if at == "nothing" else said)


def test_the_first_failure_is_the_one_that_is_told() -> None:
    failure = used(Breaking("log", closes=False)).failure
    assert failure is not None
    assert "log broke" in failure


@pytest.mark.parametrize(("seconds", "mode"), [(1, "offline"), (ASK_AGAIN + 1, "online")])
def test_a_silent_server_is_asked_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch, seconds: float, mode: str
) -> None:
    monkeypatch.setattr(room, "_online_failed", (time.monotonic() - seconds, "online failed: a reason"))
    values = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "tracker" / "wandb.yaml"))
    assert isinstance(values, dict)
    tracker = Wandb.model_validate({**values, "mode": "online"})
    found, why = tracker._mode()
    assert found == mode
    assert ("a reason" in why) == (mode == "offline")
