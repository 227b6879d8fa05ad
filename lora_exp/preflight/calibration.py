"""How fast this machine trains: measured by every real run and kept in the cache folder, for the next estimate."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from filelock import FileLock

from lora_exp.config import Config
from lora_exp.models.source import cache_dir
from lora_exp.run_folder import to_json, write_whole

FILE = "calibration.json"
KEPT = 5
"""Runs of a kind whose median counts: one beside which something else ran is outvoted."""

GEMM_SHARE = {"packed": 0.45, "padded": 0.12}
"""Of the rate of plain matrix products that a training step reaches, by engine: benchmarks/NOTES.md, RESULTS.md."""
GEMM_ROWS = 1024
GEMM_SECONDS = 0.2


@dataclass(frozen=True)
class Speed:
    """What a run measured.

    Args:
        train: Tokens a second in training; a row's tokens are its prompt and each answer once, padding not counted.
        evaluate: The same in evaluation; None where there was none.
        other: Seconds of everything else: libraries, weights, samples, saving.
    """

    train: float
    evaluate: float | None
    other: float


def kind_of(config: Config, engine: str, dtype: str, device: Mapping[str, Any]) -> str:
    """Return what runs have in common that are equally fast.

    Args:
        config: The run.
        engine: The engine that computes it.
        dtype: What it is trained in.
        device: From `lora_exp.machine.device_facts`.
    """
    bits = 8 if config.quant.load_in_8bit else 4 if config.quant.load_in_4bit else None
    parts = {
        "model": config.model.pretrained_model_name_or_path,
        "bits": bits,
        "dtype": dtype,
        "engine": engine,
        "recipe": config.recipe.name,
        "device": device["name"],
        "threads": device["threads"],
    }
    return json.dumps(parts, sort_keys=True)


def known_speed(kind: str) -> Speed | None:
    """Return the median of the last runs of a kind; None where there was none."""
    runs = _read(cache_dir() / FILE).get("speeds", {}).get(kind, [])
    if not runs:
        return None
    evaluations = [run["evaluate"] for run in runs if run["evaluate"]]
    return Speed(
        median(run["train"] for run in runs),
        median(evaluations) if evaluations else None,
        median(run["other"] for run in runs),
    )


def keep_speed(kind: str, speed: Speed) -> None:
    """Add what a run measured."""

    def add(known: dict[str, Any]) -> None:
        runs = known.setdefault("speeds", {}).setdefault(kind, [])
        runs.append(asdict(speed))
        del runs[:-KEPT]

    _change(add)


def known_process_bytes(libraries: str) -> int | None:
    """Return what a process with these libraries and no weights took when it was last seen; None if never."""
    found = _read(cache_dir() / FILE).get("processes", {}).get(libraries)
    return None if found is None else int(found)


def keep_process_bytes(libraries: str, size: int) -> None:
    """Note what a process with these libraries takes before the weights are loaded."""
    if known_process_bytes(libraries) != size:
        _change(lambda known: known.setdefault("processes", {}).__setitem__(libraries, size))


def _change(change: Any) -> None:
    path = cache_dir() / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            known = _read(path)
            change(known)
            write_whole(path, to_json(known) + "\n")
    except OSError:
        return  # a cache that cannot be written costs the next estimate its calibration, and no run its end


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def measured_speed(
    metrics: Mapping[str, float],
    log_history: Iterable[Mapping[str, Any]],
    wall_times: Mapping[str, float],
    train_tokens: float,
    eval_tokens: float,
) -> Speed | None:
    """Return what a run was like; None where it trained nothing.

    Args:
        metrics: Trainer's summary, with `train_runtime`.
        log_history: Trainer's, with an `eval_runtime` for each evaluation.
        wall_times: Seconds by stage.
        train_tokens: Tokens of all rows that were trained on, each as often as it was.
        eval_tokens: Tokens of the validation rows, once.
    """
    evaluations = [float(line["eval_runtime"]) for line in log_history if "eval_runtime" in line]
    training = float(metrics.get("train_runtime", 0.0)) - sum(evaluations)
    if training <= 0 or train_tokens <= 0:
        return None
    evaluate = eval_tokens / median(evaluations) if evaluations and eval_tokens else None
    other = sum(wall_times.values()) - wall_times.get("train", 0.0) - wall_times.get("reference", 0.0)
    return Speed(train_tokens / training, evaluate, max(other, 0.0))


def gemm_rate(shape: tuple[int, int], dtype: Any, device: Any) -> float:
    """Measure the rate of matrix products, in floating-point operations a second.

    Args:
        shape: Inputs and outputs of a layer.
        dtype: What it computes in.
        device: Where.
    """
    import torch

    inputs = torch.randn(GEMM_ROWS, shape[0], dtype=dtype, device=device)
    weight = torch.randn(shape[1], shape[0], dtype=dtype, device=device)
    seconds: list[float] = []
    while sum(seconds) < GEMM_SECONDS or len(seconds) < 3:
        start = time.perf_counter()
        torch.nn.functional.linear(inputs, weight)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * GEMM_ROWS * shape[0] * shape[1] / median(seconds)


def speed_from_gemm(rate: float, engine: str, multiplied: int, checkpointing: bool) -> Speed:
    """Return what matrix products at this rate would make of a model.

    A frozen base multiplies twice, forward and backward, each 2 operations a weight; once more where activations are
    recomputed. An evaluation, and the reference, multiply once.

    Args:
        rate: From `gemm_rate`.
        engine: The engine that computes.
        multiplied: Weights that each token is multiplied with.
        checkpointing: Whether activations are recomputed.
    """
    tokens = rate * GEMM_SHARE[engine] / (2 * multiplied)
    return Speed(tokens / (3 if checkpointing else 2), tokens, 0.0)
