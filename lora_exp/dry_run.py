"""The corridor of a dry run: what a run would cost, said in seconds, without its weights and without a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_exp.config import Config, DataConfig
from lora_exp.data.cache import data_cache
from lora_exp.data.kinds import RowKind
from lora_exp.data.load import load_splits
from lora_exp.data.split import Split
from lora_exp.data.template import use_template
from lora_exp.errors import USER_ERROR_STATUS, UserError, count, print_user_error
from lora_exp.models.source import adapter_dir, model_files
from lora_exp.quiet import quiet_libraries
from lora_exp.reports import console
from lora_exp.reports.header import header_lines
from lora_exp.secrets.home import hide_unreadable_files

if TYPE_CHECKING:
    from lora_exp.data.tokenize import TokenizedData
    from lora_exp.preflight.duration import Duration
    from lora_exp.preflight.estimate import Estimate
    from lora_exp.preflight.memory import Memory, Way
    from lora_exp.preflight.report import Line
    from lora_exp.preflight.schedule import Schedule
    from lora_exp.process.device import Device


@dataclass(frozen=True)
class Job:
    """A run that is asked about.

    Args:
        name: What sets it apart from the others of a multirun.
        config: What it is made of.
        axes: The value of each key that the multirun varies.
    """

    name: str
    config: Config
    axes: Mapping[str, str]


@dataclass(frozen=True)
class Preview:
    """What is known of a run before it starts."""

    device: Device
    data: TokenizedData
    schedule: Schedule
    memory: Memory
    way: Way
    estimate: Estimate
    duration: Duration


_rows: dict[str, dict[str, Split]] = {}
"""Rows that were read, by their section: the trials of a sweep mostly share them."""


def dry_run(jobs: Sequence[Job], choices: Mapping[str, str]) -> int:
    """Say what each run would cost; return the exit status: 0 where all could run.

    Args:
        jobs: The runs.
        choices: The option taken from each config group, by the first of them.

    Raises:
        UserError: What a single run cannot be told without: config, data, model.
    """
    quiet_libraries()
    for line in hide_unreadable_files():
        console.note(line)
    if len(jobs) == 1:
        return _one(jobs[0], choices)
    return _many(jobs)


def _one(job: Job, choices: Mapping[str, str]) -> int:
    config = job.config
    console.header(header_lines(config, choices))
    preview = _preview(config)
    from lora_exp.preflight.report import show_lengths, show_memory, show_schedule, show_time  # imports torch

    console.data_lines({split: report.as_dict() for split, report in preview.data.reports.items()}, preview.data.kept)
    for finding in (each for split in preview.data.splits.values() for each in split.findings):
        console.note(str(finding))
    trainer = config.trainer
    show_schedule(preview.schedule, trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps)
    console.say("device", preview.device.line)
    console.say("engine", _engine_line(config, preview))
    console.say("precision", f"{preview.memory.precision.dtype}: {preview.memory.precision.reason}")
    show_time(preview.duration)
    for split, report in preview.data.reports.items():
        show_lengths(split, report.lengths, config.recipe.limits[split])
    show_memory(preview.estimate, preview.memory.place)
    problems = _problems(config, preview)
    for error in problems:
        print_user_error(error)
    return USER_ERROR_STATUS if problems else 0


def _many(jobs: Sequence[Job]) -> int:
    previews = [_preview_or_error(job.config) for job in jobs]
    import torch

    from lora_exp.preflight.place import place_without_libraries
    from lora_exp.preflight.report import show_lines

    found = [_line(job, preview) for job, preview in zip(jobs, previews, strict=True)]
    devices = (preview.device.torch for preview in previews if isinstance(preview, Preview))
    place = place_without_libraries(next(devices, torch.device("cpu")))
    show_lines([line for line, _ in found], list(jobs[0].axes), place)
    told = {str(error): (job.name, error) for job, (_, errors) in zip(jobs, found, strict=True) for error in errors}
    for name, error in told.values():  # an error that several trials share once
        print_user_error(UserError(f"{name}: {error.title}", error.problems))
    return USER_ERROR_STATUS if told else 0


def _preview_or_error(config: Config) -> Preview | UserError:
    try:
        return _preview(config)
    except UserError as error:
        return error


def _line(job: Job, preview: Preview | UserError) -> tuple[Line, list[UserError]]:
    from lora_exp.preflight.lengths import effect
    from lora_exp.preflight.report import Line, line_cells

    if isinstance(preview, UserError):
        return Line(job.axes, (), fits=False, trouble=preview.title), [preview]
    train = effect(preview.data.reports["train"].lengths, job.config.recipe.limits["train"])
    at_once = preview.memory.tokens_at_once(preview.way.tokens)
    cells = line_cells(train, preview.schedule, at_once, preview.estimate, preview.duration)
    problems = _problems(job.config, preview)
    fits = preview.estimate.total <= preview.memory.room
    trouble = "" if not problems else "does not fit" if not fits else problems[0].title
    return Line(job.axes, cells, fits=not problems, trouble=trouble), problems


def _preview(config: Config) -> Preview:
    """Work out what a run would cost.

    Raises:
        UserError: As the run itself: data, model, adapter.
    """
    start = adapter_dir(config.model)
    splits = _read(config.data, config.recipe.row_kind)
    with model_files(config.model) as files:
        from lora_exp.data.tokenize import tokenize_splits
        from lora_exp.models.policy import load_tokenizer
        from lora_exp.preflight.duration import duration
        from lora_exp.preflight.memory import Memory
        from lora_exp.preflight.place import place_without_libraries, way_of
        from lora_exp.preflight.schedule import schedule
        from lora_exp.preflight.twin import read_structure
        from lora_exp.process.device import choose_device

        device = choose_device(config.device, config.trainer.use_cpu)
        recipe, tokenizer = config.recipe, load_tokenizer(config.model, files)
        use_template(tokenizer, config.data.chat_template_path)
        cache = data_cache(config.data.cache_size)
        answers, template = recipe.row_kind.answers, config.data.chat_template
        data = tokenize_splits(splits, answers, tokenizer, recipe.limits, template, cache)
        data.require_rows()
        plan = schedule(config.trainer, len(data.datasets["train"]), "val" in data.datasets)
        lengths = {split: report.lengths for split, report in data.reports.items()}
        place = place_without_libraries(device.torch)
        memory = Memory(config, read_structure(config, files), start, place, lengths)
        way = way_of(config, memory)
        found = duration(config, memory, way, plan.evaluations)
        return Preview(device, data, plan, memory, way, memory.estimate(way), found)


def _read(data: DataConfig, kind: RowKind) -> dict[str, Split]:
    key = json.dumps([data.model_dump(), kind.train_file], sort_keys=True)
    if key not in _rows:
        _rows.clear()
        _rows[key] = load_splits(data, kind)
    return _rows[key]


def _problems(config: Config, preview: Preview) -> list[UserError]:
    """Return what would stop the run before its weights are loaded."""
    from lora_exp.preflight.fit import require_fit
    from lora_exp.preflight.losses import require_rows_kept

    checks: list[Any] = [
        lambda: require_rows_kept(config.data, config.recipe.limits, preview.data.reports),
        lambda: require_fit(preview.memory, preview.way),
    ]
    problems = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(error)
    return problems


def _engine_line(config: Config, preview: Preview) -> str:
    way = preview.way
    recomputed = "recomputed" if way.checkpointing else "kept"
    if way.tokens is not None:
        exact = "if its check on the weights finds it exact"
        return f"{way.engine}, up to {count(way.tokens, 'token')} at a time, activations {recomputed}; {exact}"
    _, reason = config.engine.expected_for(preview.memory.base, config.recipe)
    return f"{way.engine}, activations {recomputed}" + (f": {reason}" if reason else "")
