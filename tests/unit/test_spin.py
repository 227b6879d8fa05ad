"""Idle threads spin briefly while other processes wait for the cores: noticed from the time that threads wait."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from lora_exp.process import spin
from lora_exp.process.spin import Load, Teams, brief_spins_beside_others, waited_s

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of threads")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute with two threads, and with no setting of the user."""
    for name in spin.OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@contextmanager
def busy(number: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def crowded(monkeypatch: pytest.MonkeyPatch, shares: list[float]) -> list[bool]:
    """Return what a load says of seconds in which threads waited for these shares of the time."""
    now, waited = [0.0], [0.0]
    monkeypatch.setattr(spin.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(spin, "waited_s", lambda: waited[0])
    load, found = Load(), []
    for share in shares:
        now[0] += 1
        waited[0] += share
        found.append(load.is_crowded())
    return found


def test_a_load_is_noticed_at_once_and_is_over_when_it_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [0.0, 0.05, 0.5, 0.15, 1.0, *[0.0] * spin.CALM, 0.0]
    expected = [False, False, True, True, True, *[True] * (spin.CALM - 1), False, False]
    assert crowded(monkeypatch, shares) == expected


def test_a_little_waiting_is_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(crowded(monkeypatch, [0.15] * 20))


def test_threads_that_end_take_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their waiting leaves the sum, which then falls."""
    assert crowded(monkeypatch, [0.5, -3.0, 0.5]) == [True, True, True]


def spun(rounds: int = 200) -> float:
    """Return the CPU time of threads that wait while this one computes alone, as a share of this one's."""
    numbers = torch.ones(2 * spin.GRAIN)
    numbers.add_(1)
    whole, alone = time.process_time(), time.thread_time()
    for _ in range(rounds):
        numbers.add_(1)
        sum(range(20_000))  # half a millisecond
    alone = time.thread_time() - alone
    return (time.process_time() - whole - alone) / alone


def test_a_team_that_waits_shortens_the_spin_and_its_end_brings_it_back() -> None:
    """What GNU OpenMP's manual says; with another OpenMP a team changes nothing."""
    teams = Teams()
    before = spun()
    teams.form()
    held = until(lambda share: share < 0.5 * before)
    teams.dismiss()
    assert teams.threads == []
    until(lambda share: share > 1.5 * held)


def until(reached: Callable[[float], bool]) -> float:
    """Measure until a share is reached, since other processes may have the cores for a while; return it."""
    deadline = time.monotonic() + 30
    while not reached(share := spun()):
        assert time.monotonic() < deadline, f"the share is {share:.2f}"
    return share


def holders() -> int:
    return sum(thread.name.startswith("Thread-") and "_hold" in thread.name for thread in threading.enumerate())


def test_busy_neighbours_are_noticed_and_nothing_stays_behind() -> None:
    """More neighbours than cores, so that threads must wait."""
    before = threading.active_count()
    with busy(4), brief_spins_beside_others():
        deadline = time.monotonic() + 60
        while not holders() and time.monotonic() < deadline:
            spun(20)
        assert holders()
    assert threading.active_count() == before


@pytest.mark.parametrize("name", spin.OWN_SETTINGS)
def test_a_users_own_setting_wins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7" if name == "GOMP_SPINCOUNT" else "ACTIVE")
    before = threading.active_count()
    with brief_spins_beside_others():
        assert threading.active_count() == before


def test_a_system_that_does_not_count_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(spin, "TASKS", tmp_path)
    assert waited_s() is None
    before = threading.active_count()
    with brief_spins_beside_others():
        assert threading.active_count() == before


def test_one_thread_has_no_team() -> None:
    torch.set_num_threads(1)
    teams = Teams()
    teams.form()
    assert teams.threads == []


def test_numbers_do_not_depend_on_a_team() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(300, 300), torch.randn(300, 300)
    before, teams = x @ y, Teams()
    teams.form()
    assert torch.equal(x @ y, before)
    teams.dismiss()
