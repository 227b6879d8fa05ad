"""A run that is killed at any moment, and gone on with, is the run that was left alone."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from tests.faults.harness import Moment, Server, Tally, after, outcome, started, when_there

KILLS = int(os.environ.get("LORA_EXP_FAULT_KILLS", "3"))

COMMON = [
    "trainer=cpu", "tracker=none", "recipe.max_length=64", "samples.num_prompts=1", "samples.max_new_tokens=4",
    "trainer.per_device_train_batch_size=4", "trainer.per_device_eval_batch_size=16", "trainer.logging_steps=1",
]  # fmt: skip
RUNS = {
    # Saved between epochs and at their ends, evaluated in between.
    "sft": ["recipe=sft", "trainer.max_steps=10", "trainer.save_strategy=steps", "trainer.save_steps=3",
            "trainer.eval_strategy=steps", "trainer.eval_steps=4", "trainer.save_total_limit=1"],
    # Two epochs, several batches a step, a best checkpoint, an evaluation before the first step.
    "dpo": ["recipe=dpo", "data.train_file=train.dpo.jsonl", "data=splits", "trainer.num_train_epochs=2",
            "trainer.gradient_accumulation_steps=2", "trainer.load_best_model_at_end=true",
            "trainer.eval_on_start=true"],
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a few of the packaged rows."""
    sample = Path(__file__).parents[2] / "lora_exp" / "data" / "sample"
    folder = tmp_path_factory.mktemp("rows")
    for name, number in (("train.dpo.jsonl", 29), ("val.dpo.jsonl", 6)):
        (folder / name).write_text("".join((sample / name).read_text().splitlines(keepends=True)[:number]))
    return folder


@pytest.fixture(scope="module")
def whole(server: Server, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float]]:
    """Return the folder of each run that nothing happens to, and its seconds."""
    found = {}
    for name, overrides in RUNS.items():
        cwd = tmp_path_factory.mktemp(name)
        times: list[float] = []

        def note(running: object, times: list[float] = times) -> bool:
            times.append(running.seconds)  # type: ignore[attr-defined]
            return False

        command = [*COMMON, *overrides, f"data.splits_dir={rows}"] if name == "dpo" else [*COMMON, *overrides]
        ended = server.run(*command, "output_dir=run", cwd=cwd, folder=cwd / "run", harm={"SIGKILL": note})
        assert ended.status == 0, ended.said
        found[name] = (cwd / "run", times[-1])
    return found


def moment(random: Random, seconds: float) -> tuple[str, Moment]:
    """Draw when to kill: at any time, or while a certain thing is being written."""
    writes = {
        "in a checkpoint's write": "checkpoints/.part/*",
        "in a later checkpoint's write": "checkpoints/checkpoint-*/../.part/*",
        "in the adapter's write": ".part/*",
        "before the numbers are written": "adapter",
        "before the page is written": "samples.jsonl",
    }
    kind = random.choice(["at any time"] * len(writes) + list(writes))
    if kind == "at any time":
        return kind, after(random.uniform(0, seconds))
    return kind, when_there(writes[kind], random.choice([0.0, random.uniform(0, 0.03)]))


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_run_is_gone_on_with_to_the_same_bits(
    server: Server,
    rows: Path,
    whole: dict[str, tuple[Path, float]],
    tally: Tally,
    random: Random,
    tmp_path: Path,
    number: int,
) -> None:
    name = list(RUNS)[number % len(RUNS)]
    alone, seconds = whole[name]
    begin = [*COMMON, *RUNS[name], "output_dir=run"]
    begin += [f"data.splits_dir={rows}"] if name == "dpo" else []
    folder, kinds = tmp_path / "run", []
    for _ in range(random.choice([1, 1, 2])):
        kind, when = moment(random, seconds)
        command = ["resume=run"] if started(folder) else begin
        ended = server.run(*command, cwd=tmp_path, folder=folder, harm={"SIGKILL": when})
        assert ended.status in (0, -9), ended.said
        if ended.status == -9:
            kinds.append(f"killed {kind}")
            tally.inject(kinds[-1])
    ended = server.run(*(["resume=run"] if started(folder) else begin), cwd=tmp_path, folder=folder)
    assert ended.status == 0, ended.said
    assert outcome(folder) == outcome(alone), kinds
    for kind in kinds:
        tally.survive(kind)
