"""The corridor: one run from its config to its results, in the order in which it happens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config import Config
from lora_exp.data.load import load_splits
from lora_exp.disk import room_for_files, writing
from lora_exp.errors import Pruned
from lora_exp.libraries import load_libraries
from lora_exp.machine import (
    ask_for_determinism,
    bound_kernel_caches,
    device_facts,
    isolated_job,
    keep_freed_memory,
    peak_memory_bytes,
    release_memory,
    reset_peak_memory,
    told_if_nondeterministic,
)
from lora_exp.models.source import adapter_dir
from lora_exp.preparation import Prepared, build_trainer, keeps_reference, open_store, prepare_training
from lora_exp.process.device import choose_device, hide_gpus
from lora_exp.process.ranks import require_one_process
from lora_exp.process.spin import brief_spins_beside_others
from lora_exp.process.threads import recorded_threads, use_threads
from lora_exp.provenance import adapter_facts, data_facts
from lora_exp.quiet import quiet_libraries
from lora_exp.report import show_result
from lora_exp.reports import console
from lora_exp.reports.header import header_lines
from lora_exp.reports.page import write_page
from lora_exp.rules import flatten
from lora_exp.run_folder import RunFolder, read_jsonl
from lora_exp.run_lock import only_run
from lora_exp.secrets.home import hide_unreadable_files
from lora_exp.secrets.masking import masked_config
from lora_exp.sweeps.earlier import earlier_trial
from lora_exp.sweeps.identity import identity_of
from lora_exp.sweeps.trials import directions_of
from lora_exp.tracking.base import Ending, Guarded, RunInfo
from lora_exp.training.checkpoints import Found, checkpoint_to_resume, newest_checkpoint, settle
from lora_exp.training.interrupt import Interrupts
from lora_exp.training.memory import MemoryGuard, OutOfMemory
from lora_exp.validation import validate

if TYPE_CHECKING:
    from lora_exp.search.pruning import SearchTrial


@dataclass(frozen=True)
class Launch:
    """How a run was started.

    Args:
        folder: Where its results go.
        choices: The option taken from each config group, for the header.
        sweep: The name of the multirun that it is a job of.
        name: What it is called at a tracker.
        trial: Which trial of a search it is.
        threads: The thread count of the run that is resumed or reproduced; `engine.num_threads` overrides it.
        before_training: Told what `run.json` says, once all that the run is made of is loaded; may raise.
    """

    folder: Path
    choices: Mapping[str, str] = field(default_factory=dict)
    sweep: str | None = None
    name: str = ""
    trial: SearchTrial | None = None
    threads: int | None = None
    before_training: Callable[[Mapping[str, Any]], None] | None = None


def run(composed: DictConfig, launch: Launch) -> float | list[float] | None:
    """Train what the config says.

    Returns:
        The objective, for the sweeper, or all where the config names several; None where there is no evaluation
        data, and for a trial that was pruned.

    Raises:
        UserError: What the user can mend: config, data, model, folder.
    """
    require_one_process()
    config = validate(composed)
    composed.output_dir = str(launch.folder)
    written = masked_config(composed)
    resolved: dict[str, Any] = OmegaConf.to_container(written)  # type: ignore[assignment]
    with only_run(launch.folder):
        identity = identity_of(resolved)
        before = earlier_trial(launch.folder, identity) if launch.sweep else None
        # What a search has pruned a grid runs to its end.
        if before is not None and (before.status == "finished" or (before.status == "pruned" and launch.trial)):
            console.say(before.status, f"{launch.folder} holds this trial already")
            return _returned(before.objectives)
        goes_on = before is not None or _same(config.resume, launch.folder)
        # Looked up before the folder is claimed: a wrong folder name must not mark a finished run as failed.
        resume = str(launch.folder) if before else config.resume
        found = checkpoint_to_resume(resume, resolved, goes_on)
        if resume:
            launch = replace(launch, threads=recorded_threads(Path(resume)))
        start = adapter_dir(config.model)
        axes = _axes(resolved, launch)
        folder = RunFolder(launch.folder)
        info = RunInfo(folder.path, resolved, launch.name, launch.sweep, config.recipe.name, axes, goes_on)
        command = "the same command" if launch.sweep else f"python -m lora_exp resume={launch.folder}"
        try:
            facts = {"identity": identity, **_facts(config, launch)}
            with (
                folder.open(OmegaConf.to_yaml(written), goes_on, **facts),
                told_if_nondeterministic(),
                Interrupts(folder, config.trainer.grace_seconds, command, found.checkpoint) as interrupts,
            ):
                settle(folder, found)
                objectives = _run_within_memory(config, Attempt(folder, launch, info, found, start, interrupts))
        except Pruned as reason:
            write_page(folder.path)
            console.say("pruned", str(reason))
            return None
        except Exception:
            if folder.facts and (folder.path / "metrics.jsonl").exists():
                with suppress(OSError):  # a disk that is full; the error itself goes on
                    write_page(folder.path)
            raise
        finally:
            _check_base()
    show_result(folder.path, table=launch.sweep is None)
    return _returned(objectives)


def _same(resume: str | None, folder: Path) -> bool:
    return resume is not None and Path(resume).resolve() == folder.resolve()


@dataclass(frozen=True)
class Attempt:
    """What stays the same where a run is tried again with less at a time, but for the checkpoint.

    Args:
        folder: The run's.
        launch: How it was started.
        info: What the tracker is told.
        found: Where it goes on from.
        start: The adapter to go on from; None for a new one.
        interrupts: Who may ask it to leave.
    """

    folder: RunFolder
    launch: Launch
    info: RunInfo
    found: Found
    start: Path | None
    interrupts: Interrupts


def _run_within_memory(config: Config, attempt: Attempt) -> list[float] | None:
    """Run, and where memory runs out and `trainer.auto_find_batch_size` allows it, go on with less at a time."""
    for line in hide_unreadable_files():
        console.note(line)
    while True:
        for line in attempt.found.say():
            console.note(line)
        try:
            with isolated_job():
                return _run(config, attempt)
        except OutOfMemory as error:
            if not config.trainer.auto_find_batch_size or error.smaller is None:
                raise
            config, change = error.smaller, error.change
        release_memory()  # now that the error is gone, whose frames held the tensors
        found = newest_checkpoint(attempt.folder.checkpoints)
        where = found.checkpoint.name if found.checkpoint else "the first step"
        console.note(f"memory ran out; again from {where} with {change}")
        attempt = replace(attempt, found=found, info=replace(attempt.info, goes_on=True))


def _returned(objectives: list[float] | None) -> float | list[float] | None:
    return objectives[0] if objectives and len(objectives) == 1 else objectives


def _axes(resolved: dict[str, Any], launch: Launch) -> dict[str, Any]:
    """Return what the sweep varies in this run: of a group the option, of a key the value."""
    values = {**flatten(resolved), **launch.choices}
    return {axis: values.get(axis) for axis in resolved["sweep"]["axes"]}


def _check_base() -> None:
    if "lora_exp.models.shared" not in sys.modules:
        return
    from lora_exp.models.shared import SHARED_BASE

    if not SHARED_BASE.untouched():
        console.note("this run changed the base weights; the next job of this process loads them afresh")


def _run(config: Config, attempt: Attempt) -> list[float] | None:
    memory = MemoryGuard(config, attempt.folder)
    with memory.told(), room_for_files(attempt.folder.path):
        return _guarded_run(config, attempt, memory)


def _guarded_run(config: Config, attempt: Attempt, memory: MemoryGuard) -> list[float] | None:
    folder, launch = attempt.folder, attempt.launch
    quiet_libraries()
    trial = launch.folder.name if launch.sweep else None
    console.header(header_lines(config, launch.choices, [("folder", str(launch.folder))], trial))
    if keeps_reference(config, config.engine):
        with open_store(config):
            pass  # a place that cannot be written is told before anything is loaded
    with folder.stage("data"):
        splits = load_splits(config.data, config.recipe.row_kind)
        folder.note(data=data_facts(splits), start_adapter=adapter_facts(attempt.start))
    keep_freed_memory()
    bound_kernel_caches()
    with folder.stage("model"):
        device = choose_device(config.device, config.trainer.use_cpu)
        if device.torch.type == "cpu":
            hide_gpus()
        load_libraries()
    console.say("device", device.line)
    console.say("machine", use_threads(config.engine.num_threads, launch.threads))
    if config.deterministic:
        console.say("bits", ask_for_determinism(config.seed))
    reset_peak_memory(device.torch)
    prepared = prepare_training(config, folder, splits, attempt.start, device.torch)
    memory.engine, memory.work = prepared.engine, prepared.work
    policy = prepared.policy
    folder.note(
        device=device_facts(policy.device),
        dtype=policy.precision.dtype,
        base=policy.base,
        trainable_parameters=policy.trainable_parameters,
        target_modules=policy.target_modules,
        engine=prepared.engine.name,
        reference={"model": policy.reference if config.recipe.needs_reference else None, "computed": 0, "reused": 0},
    )

    if attempt.launch.before_training is not None:
        attempt.launch.before_training(folder.facts)
    tracker = Guarded.start(config.tracker, replace(attempt.info, logged=attempt.found.lines))
    failed_to_start = tracker.failure
    console.say("tracker", failed_to_start or tracker.where or "none")
    ending: Ending = "failed"
    try:
        from lora_exp.training.loop import leave_on_signal, report_to

        with brief_spins_beside_others():
            trainer = build_trainer(config, folder, prepared, tracker)
            if launch.trial is not None:
                report_to(launch.trial, trainer, config.objectives[0])
            leave_on_signal(attempt.interrupts, trainer)
            with attempt.interrupts.keeping_the_end(trainer.checkpoint_of_end):
                final = _train(config, attempt, prepared, trainer)
                from lora_exp.preflight.duration import keep_measured_speed

                keep_measured_speed(config, prepared, trainer, final, folder.wall_times)
                found = _objectives(config, final)
                objective = next(iter(found.values()), None)
                peak = peak_memory_bytes(policy.device)
                folder.note(objective=objective, objectives=found, peak_memory_bytes=peak)
                tracker.summarize({**final, "objective": objective, "peak_memory_bytes": peak})
                tracker.table("samples", read_jsonl(folder.path / "samples.jsonl"))
                tracker.adapter(folder.adapter)
        ending = "finished"
    except Pruned:
        ending = "pruned"
        raise
    finally:
        tracker.finish(ending)
    if tracker.failure and not failed_to_start:
        console.note(tracker.failure)
    return list(found.values()) or None


def _facts(config: Config, launch: Launch) -> dict[str, Any]:
    """Return what `run.json` says before anything is loaded."""
    return {
        "recipe": config.recipe.name,
        "model": config.model.pretrained_model_name_or_path,
        "objective_name": config.objectives[0],
        "direction": directions_of(config.objectives, config.direction)[0],
        "headline": config.recipe.headline,
        "trust_remote_code": config.model.trust_remote_code,
        "choices": dict(launch.choices),
        # From the first moment on: a resume that ends before it trains must not lose the count.
        **({"device": {"threads": launch.threads}} if launch.threads else {}),
    }


def _train(config: Config, attempt: Attempt, prepared: Prepared, trainer: Any) -> dict[str, float]:
    """Train, evaluate and save; return the final numbers."""
    from lora_exp.models.policy import save_adapter
    from lora_exp.training.loop import evaluate, train
    from lora_exp.training.samples import answer, fixed_prompts, length_metrics

    data, policy, folder = prepared.data, prepared.policy, attempt.folder
    prompts = fixed_prompts(data, config.recipe.row_kind.answers[0], config.samples.num_prompts)
    length = config.samples.max_new_tokens
    with folder.stage("evaluate"):
        before = answer(policy.model, data.tokenizer, prompts, length)
    with folder.stage("train"), attempt.interrupts.between_steps():
        final = train(trainer, attempt.found.checkpoint)
    with folder.stage("evaluate"):
        final |= evaluate(trainer, "val" in data.datasets)
        after = answer(policy.model, data.tokenizer, prompts, length)
        final |= length_metrics(after)
    with folder.stage("save"):
        with writing("the adapter", folder.adapter, folder.path):
            save_adapter(policy, data.tokenizer, folder.adapter)
        folder.write_json("metrics.json", final)
        answers = zip(prompts, before, after, strict=True)
        folder.write_jsonl(
            "samples.jsonl",
            [{"prompt": p.text, "expected": p.expected, "before": b.text, "after": a.text} for p, b, a in answers],
        )
    folder.note(best_checkpoint=trainer.state.best_model_checkpoint, best_metric=trainer.state.best_metric)
    return final


def _objectives(config: Config, final: Mapping[str, float]) -> dict[str, float]:
    """Return what the trial is compared by; nothing where a part of it is missing."""
    missing = [name for name in config.objectives if name not in final]
    if missing:
        console.note(f"no objective: {', '.join(missing)} is not among the final metrics ({', '.join(sorted(final))})")
        return {}
    return {name: final[name] for name in config.objectives}
