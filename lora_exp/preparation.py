"""What a run reads before it trains: token ids, the model with its adapter, the engine, the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.config import Config
from lora_exp.data.cache import data_cache
from lora_exp.data.split import Split
from lora_exp.data.template import use_template
from lora_exp.data.tokenize import TokenizedData, tokenize_splits
from lora_exp.engine.store import ReferenceStore, default_path
from lora_exp.machine import return_freed_memory
from lora_exp.models.source import model_files
from lora_exp.reports import console
from lora_exp.run_folder import RunFolder

if TYPE_CHECKING:
    from lora_exp.engine.base import Engine, Work
    from lora_exp.engine.identity import Identity
    from lora_exp.models.policy import Policy
    from lora_exp.tracking.base import ActiveRun


@dataclass(frozen=True)
class Prepared:
    """Everything that a run reads, before anything of it is trained.

    Args:
        data: The token ids.
        policy: The model with its adapter.
        engine: Computes the numbers under the loss; not always the one asked for.
        work: What the engine has to compute.
        identity: The reference model's name in the store; None where no reference is kept.
    """

    data: TokenizedData
    policy: Policy
    engine: Engine
    work: Work
    identity: Identity | None


def prepare_training(
    config: Config, folder: RunFolder, splits: dict[str, Split], start: Path | None, device: Any
) -> Prepared:
    """Tokenize the rows, load the model with its adapter and settle how it is computed.

    Args:
        config: What the run is made of.
        folder: Where its reports go.
        splits: The rows.
        start: The adapter to go on from; None for a new one.
        device: The torch device that it trains on.
    """
    from lora_exp.preflight.fit import require_fit
    from lora_exp.preflight.place import memory_of_this_process
    from lora_exp.training.loop import choose_engine

    with model_files(config.model) as files:
        with folder.stage("data"):
            data = tokenize(config, folder, splits, files)
        with folder.stage("model"):
            memory, way = memory_of_this_process(config, data.reports, files, start, device)
            folder.note(estimated_memory_bytes=memory.estimate(way).total)
            if not config.trainer.auto_find_batch_size:  # which finds by trying what fits
                require_fit(memory, way)
            policy = _load(config, files, start, folder, device)
            engine, work = choose_engine(config, folder, policy, data, memory)
            identity = _reference_identity(config, engine, policy, files)
    return Prepared(data, policy, engine, work, identity)


def build_trainer(config: Config, folder: RunFolder, prepared: Prepared, tracker: ActiveRun) -> Any:
    """Return the trainer, with its reference where one is kept."""
    from lora_exp.training.loop import make_trainer

    trainer = make_trainer(config, folder, prepared.engine, prepared.work, prepared.data, tracker)
    if prepared.identity is not None:
        with folder.stage("reference"):
            folder.note(reference=_reference(config, prepared.engine, trainer, prepared.policy, prepared.identity))
    return trainer


def tokenize(config: Config, folder: RunFolder, splits: dict[str, Split], files: str) -> TokenizedData:
    """Turn the rows into the token ids that the run trains on; say and write down what was cut or dropped."""
    from lora_exp.models.policy import load_tokenizer
    from lora_exp.preflight.losses import require_rows_kept

    tokenizer = load_tokenizer(config.model, files)
    use_template(tokenizer, config.data.chat_template_path)
    recipe = config.recipe
    cache = data_cache(config.data.cache_size)
    data = tokenize_splits(splits, recipe.row_kind.answers, tokenizer, recipe.limits, config.data.chat_template, cache)
    reports = {split: report.as_dict() | splits[split].found() for split, report in data.reports.items()}
    folder.write_json("data_report.json", reports)
    console.data_lines(reports, data.kept)
    for line in [str(finding) for split in splits.values() for finding in split.findings] + cache.failures:
        console.note(line)
    data.require_rows()
    require_rows_kept(config.data, recipe.limits, data.reports)
    return data


def _load(config: Config, files: str, start: Path | None, folder: RunFolder, device: Any) -> Policy:
    from lora_exp.models.policy import load_policy

    policy = load_policy(config, files, start, folder.checkpoints, device)
    return_freed_memory()  # what reading the files left behind, in parts of the heap that training would not use again
    console.say("precision", f"{policy.precision.dtype}: {policy.precision.reason}")
    share = policy.trainable_parameters / policy.total_parameters
    console.say(
        "adapter",
        f"{policy.trainable_parameters:,} of {policy.total_parameters:,} parameters train ({share:.2%}), "
        f"on {' '.join(name.rpartition('.')[2] for name in policy.target_modules[:12])}",
    )
    for line in policy.notes:
        console.note(line)
    return policy


def keeps_reference(config: Config, engine: Engine) -> bool:
    """Whether the recipe needs reference log-probabilities, and the engine keeps them between runs."""
    return bool(config.recipe.needs_reference and engine.keeps_reference)


def _reference_identity(config: Config, engine: Engine, policy: Policy, files: str) -> Identity | None:
    """Return the name of the reference model in the store; None where no reference is kept."""
    if not keeps_reference(config, engine):
        return None
    from lora_exp.engine.identity import reference_identity

    with open_store(config) as store:
        return reference_identity(config, engine, policy, files, store.file_digest)


def _reference(config: Config, engine: Engine, trainer: Any, policy: Policy, identity: Identity) -> dict[str, Any]:
    """Give the trainer its reference and say where it came from."""
    from lora_exp.engine.identity import rows_not_read

    with open_store(config) as store:
        not_read = rows_not_read(identity, store.summary())
        if not_read:
            console.note(not_read)
        facts = engine.reference(trainer, store, identity)
    console.say("reference", f"{facts['computed']:,} rows computed, {facts['reused']:,} read from {store.path}")
    return {"model": policy.reference, **facts}


@contextmanager
def open_store(config: Config) -> Iterator[ReferenceStore]:
    """Open the store that `store.path` names, or the user's, and print what became of a file that was no store.

    Raises:
        UserError: If it cannot be used.
    """
    path = Path(config.store.path) if config.store.path else default_path()
    with ReferenceStore(path, config.store.max_size) as store:
        try:
            yield store
        finally:  # damage may also show only when the rows are read
            if store.note:
                console.note(store.note)
