"""Run folders of a sweep as runs leave them, without the hours that training takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

HEADLINE = {"loss": "loss", "rewards/accuracies": "reward accuracy"}


def make_trial(
    folder: Path, settings: Mapping[str, Any], objective: float | None = None, *, seed: int = 1, **run: Any
) -> Path:
    """Write the folder of a DPO run.

    Args:
        folder: It.
        settings: Config keys and their values.
        objective: The final reward accuracy; None: the run ended before it had one.
        seed: Of the config.
        run: Facts of `run.json` to put in or to change.
    """
    overrides = [f"{key}={value}" for key, value in settings.items()] + [f"seed={seed}"]
    base = {
        "lora.r": 16,
        "recipe.beta": 0.1,
        "trainer.learning_rate": 1e-3,
        "recipe.objective": "eval_rewards/accuracies",
    }
    config = OmegaConf.create()
    for key, value in {
        **base,
        **settings,
        "seed": seed,
        "output_dir": str(folder),
        "tracker.name": folder.name,
    }.items():
        OmegaConf.update(config, key, value, force_add=True)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(overrides)))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    facts = {
        "status": "failed" if objective is None else "finished",
        "objective": objective,
        "objective_name": "eval_rewards/accuracies",
        "headline": HEADLINE,
        "model": "lora_exp/tiny",
        "choices": {"recipe": "dpo", "model": "tiny", "lora": "lora"},
        "error": None,
        "wall_times": {"data": 0.5, "train": 60.0 + seed, "save": 0.1},
        "peak_memory_bytes": 2**30 + seed * 2**20,
        **run,
    }
    (folder / "run.json").write_text(json.dumps(facts))
    reached = 0.6 if objective is None else objective
    steps: list[dict[str, Any]] = [
        {"step": 0, "eval_loss": 0.69, "eval_rewards/accuracies": 0.0, "eval_logps/chosen": -90.0}
    ]
    for step in range(10, 101, 10):
        share = reached * step / 100
        steps.append({"step": step, "loss": 0.7 - share / 2, "rewards/accuracies": share + 0.05})
        if step % 20 == 0:
            line = {
                "eval_loss": 0.7 - share / 3,
                "eval_rewards/accuracies": share,
                "eval_logps/chosen": -90 - 9 * share,
            }
            steps.append({"step": step, **line})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    if objective is not None:
        final = {"eval_loss": 0.7 - objective / 3, "eval_rewards/accuracies": objective}
        (folder / "metrics.json").write_text(json.dumps(final))
        sample = {"prompt": "Where is my parcel?", "expected": "On its way.", "before": "xx", "after": f"{settings}"}
        (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
        (folder / "adapter").mkdir()
    return folder


def make_sweep(folder: Path, seeds: int = 3) -> Path:
    """Write a grid of two settings, best first unlike its numbering, with one failed, one pruned and one running."""
    number = 0
    for beta in (0.05, 0.1, 0.5):
        for rank in (4, 16):
            for seed in range(1, seeds + 1):
                settings = {"recipe.beta": beta, "lora.r": rank}
                objective = 0.5 + beta / 2 + rank / 200 + seed / 300 + seed * rank / 9000
                make_trial(folder / str(number), settings, objective, seed=seed)
                number += 1
    make_trial(
        folder / str(number), {"recipe.beta": 3.0, "lora.r": 4}, error="OutOfMemoryError: tried to allocate\n2 GiB"
    )
    make_trial(folder / str(number + 1), {"recipe.beta": 1.0, "lora.r": 4}, status="pruned")
    make_trial(folder / str(number + 2), {"recipe.beta": 2.0, "lora.r": 4}, status="running")
    return folder
