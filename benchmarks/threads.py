"""How long idle threads spin, against neighbours: seconds of an optimiser step of DPO beside other processes.

    python -m benchmarks.threads [--model tiny] [--condition idle] [--rounds 5] [--spins N] [--write]

Each setting has a process that stays, trains a few steps when it is asked to, and sleeps meanwhile. They take turns, so
that a round compares the same steps under all settings. Start-up is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from lora_exp.errors import count
from lora_exp.process.spin import OWN_SETTINGS
from lora_exp.process.threads import usable_cores

HERE = Path(__file__).parent
RESULTS = HERE / "THREADS.md"
UNWATCHED = "BENCHMARK_UNWATCHED"
"""Of `benchmarks.steps`, which takes a second to import."""
UNSET = ("OMP_NUM_THREADS", UNWATCHED, *OWN_SETTINGS)
"""Variables that a worker has by its setting alone."""

NOTHING, OURS = "nothing set", "lora_exp"
IDLE, TWO_RUNS = "idle", "two runs at once"
NEIGHBOURS = {"one busy neighbour": 1, "two busy neighbours": 2}
CONDITIONS = (IDLE, *NEIGHBOURS, TWO_RUNS)
BUSY = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
while True:
    pass
"""

ROWS = 64
COMMON = (
    "recipe=dpo",
    "data=splits",
    "data.splits_dir=null",
    "data.max_dropped_share=null",
    "tracker=none",
    "samples.num_prompts=0",
    "trainer.eval_strategy=no",
    "trainer.save_strategy=no",
    "trainer.max_steps=1000000",
    "trainer.logging_steps=1000000",
    "trainer.gradient_checkpointing=false",
    "engine.tokens_per_microbatch=2048",  # `auto` would look at the memory that the other workers leave
)


@dataclass(frozen=True)
class Setting:
    """What a worker is started with."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Load:
    """A model that is trained: its overrides, and the steps of one measurement, on an idle machine and else."""

    overrides: tuple[str, ...]
    idle_steps: int
    steps: int


MODELS = {
    "tiny": Load(("model=tiny",), 30, 10),
    "smollm2_135m": Load(("model=smollm2_135m", "trainer.per_device_train_batch_size=1"), 2, 1),
}


def settings(spins: Sequence[int]) -> list[Setting]:
    """Return what is compared: today's default of OpenMP, this project's, others, and further spin counts."""
    return [
        Setting(NOTHING, {UNWATCHED: "1"}),
        Setting(OURS),
        *(Setting(f"GOMP_SPINCOUNT={each}", {"GOMP_SPINCOUNT": str(each)}) for each in (1000, *spins)),
        Setting("OMP_WAIT_POLICY=PASSIVE", {"OMP_WAIT_POLICY": "PASSIVE"}),
        Setting("one thread", {}, ("engine.num_threads=1",)),
    ]


class Worker:
    """A process of `benchmarks.steps`."""

    def __init__(self, setting: Setting, load: Load, scratch: Path, name: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in UNSET}
        data = [f"data.train_file={scratch / 'rows.jsonl'}", f"store.path={scratch / 'reference.sqlite3'}"]
        overrides = [*COMMON, *data, *load.overrides, *setting.overrides]
        self.log = scratch / f"{name}.log"
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(  # noqa: S603 - this project's own module
                [sys.executable, "-W", "ignore", "-m", "benchmarks.steps", str(scratch / name), *overrides],
                cwd=HERE.parent,
                env={**environment, **setting.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask(self, steps: int) -> None:
        """Have it train."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def answer(self) -> float:
        """Wait until it has, and return the seconds."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                return float(json.loads(line)["seconds"])
        sys.exit(f"a worker ended:\n{self.log.read_text(encoding='utf-8')[-4000:]}")

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


@contextmanager
def workers(chosen: Sequence[Setting], load: Load, scratch: Path, prefix: str) -> Iterator[dict[str, Worker]]:
    """Give a worker for each setting, its first steps behind it. The first one fills the reference store for all."""
    with ExitStack() as stack:
        found: dict[str, Worker] = {}
        for number, setting in enumerate(chosen):
            worker = found[setting.name] = Worker(setting, load, scratch, f"{prefix}{number}")
            stack.callback(worker.end)
            worker.ask(load.steps)
            worker.answer()
        yield found


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Run other processes that compute all the time, and end with this one, however that may be."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE) for _ in range(number)]  # noqa: S603
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


Seconds = dict[str, list[float]]
"""By setting: seconds of a step, one for each round."""


def measure(teams: Mapping[str, Sequence[Worker]], steps: int, rounds: int) -> Seconds:
    """Let the settings train by turns. Of two runs at once the later end counts.

    What ran before changes the time of a setting by several percent, so each round starts from another setting, and
    every other round goes backwards.
    """
    names = list(teams)
    seconds: Seconds = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in (names[first:] + names[:first])[:: -1 if turn % 2 else 1]:
            for worker in teams[name]:
                worker.ask(steps)
            seconds[name].append(max([worker.answer() for worker in teams[name]]) / steps)
    return seconds


def measure_model(
    load: Load, chosen: Sequence[Setting], conditions: Sequence[str], rounds: int
) -> Iterator[tuple[str, Seconds]]:
    """Yield each condition with what it gave."""
    with tempfile.TemporaryDirectory(prefix="threads-") as name, ExitStack() as stack:
        scratch = Path(name)
        lines = files("lora_exp.data").joinpath("sample", "train.dpo.jsonl").read_text(encoding="utf-8").splitlines()
        (scratch / "rows.jsonl").write_text("\n".join(lines[:ROWS]) + "\n", encoding="utf-8")
        team = stack.enter_context(workers(chosen, load, scratch, "worker"))
        for condition in conditions:
            teams = {name: [worker] for name, worker in team.items()}
            if condition == TWO_RUNS:
                others = stack.enter_context(workers(chosen, load, scratch, "other"))
                teams = {name: [worker, others[name]] for name, worker in team.items()}
            with busy(NEIGHBOURS.get(condition, 0)):
                steps = load.idle_steps if condition == IDLE else load.steps
                yield condition, measure(teams, steps, rounds)


def ratio(seconds: Seconds, one: str, other: str) -> float:
    """Return how much longer one setting takes than another: the median over the rounds."""
    return median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def row(model: str, condition: str, seconds: Seconds) -> list[str]:
    """Return a line of the table."""
    best = min(seconds, key=lambda name: median(seconds[name]))
    cells = [f"{median(values):.3f} ({ratio(seconds, name, best):.2f})" for name, values in seconds.items()]
    return [model, condition, *cells, f"{ratio(seconds, OURS, best):.2f}", f"{ratio(seconds, OURS, NOTHING):.3f}"]


def main() -> None:
    """Measure, print and, if asked, write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="may be repeated; all unless given")
    parser.add_argument("--condition", choices=CONDITIONS, action="append", help="may be repeated; all unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--spins", type=int, action="append", default=[], help="one more GOMP_SPINCOUNT; repeatable")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    arguments = parser.parse_args()
    chosen, console = settings(arguments.spins), Console(width=170)
    table = Table("model", "beside", *(each.name for each in chosen), f"{OURS} / best", f"{OURS} / {NOTHING}")
    for model in arguments.model or MODELS:
        conditions = arguments.condition or CONDITIONS
        for condition, seconds in measure_model(MODELS[model], chosen, conditions, arguments.rounds):
            table.add_row(*row(model, condition, seconds))
            console.print(*row(model, condition, seconds), sep=" | ")
            if arguments.write:  # after each condition: what was measured is not lost with what follows
                write(table, arguments.rounds)
    console.print(table)


def write(table: Table, rounds: int) -> None:
    """Write the table as Markdown."""
    import torch

    from benchmarks.results import markdown
    from lora_exp.machine import device_facts
    from lora_exp.provenance import versions

    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    machine = f"{device_facts(torch.device('cpu'))['name']}, {count(usable_cores(), 'core')}, {platform.system()}"
    steps = ", ".join(f"of {name} {load.idle_steps} steps idle, {load.steps} else" for name, load in MODELS.items())
    lines = [
        "# Threads that spin",
        "",
        "Seconds of an optimiser step of DPO, median of the rounds; in brackets how many times that of the fastest "
        "setting of the line, median of the ratios of the rounds. `python -m benchmarks.threads --write`",
        "",
        f"Machine: {machine}; {packages}.",
        f"{count(rounds, 'round')} by turns, {steps}. {OURS}: idle threads spin briefly while the process waits for "
        "cores (`lora_exp/process/spin.py`). Each turn begins with steps that are not counted: a run goes on for "
        "longer. OMP_NUM_THREADS is unset. A busy neighbour is a process that computes all the time; two runs at once "
        "have one setting, and the later end counts.",
        "",
        *markdown(table),
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
