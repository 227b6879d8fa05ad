"""Whether a run fits into memory, and what would make it fit: first the changes that leave every number as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from lora_exp.config import CONF_DIR, Config, QuantConfig
from lora_exp.engine.settings import LEAST_TOKENS, size_text
from lora_exp.errors import Problem, UserError
from lora_exp.models.policy import writes_into_base
from lora_exp.preflight.lengths import with_length
from lora_exp.preflight.memory import Memory, Way

SHORTEST = 128
"""Tokens of a row below which nobody wants to go."""


@dataclass(frozen=True)
class Change:
    """A change of the config.

    Args:
        override: What to type.
        cost: What it costs.
        memory: The changed run.
        way: How that is computed.
    """

    override: str
    cost: str
    memory: Memory
    way: Way

    @property
    def total(self) -> int:
        """The bytes that it then needs."""
        return self.memory.estimate(self.way).total


def require_fit(memory: Memory, way: Way) -> None:
    """Check that the run fits into the memory there is.

    Raises:
        UserError: If it cannot; with the changes that would make it fit, in order of least harm.
    """
    estimate = memory.estimate(way)
    if estimate.total <= memory.room:
        return
    parts = ", ".join(f"{item.name} {size_text(item.size)}" for item in sorted(estimate.items, key=lambda i: -i.size))
    what = (
        f"the run would need about {size_text(estimate.total)} in {estimate.stage}, and there are "
        f"{size_text(memory.room)} ({size_text(memory.place.free)} free, the rest held by this process)"
    )
    raise UserError(f"{what}\n  {parts}", mends(memory, way))


def mends(memory: Memory, way: Way) -> list[Problem]:
    """Return each change that is enough by itself; where none is, the least that are enough together."""
    enough = [change for change in changes(memory, way) if change.total <= memory.room]
    if enough:
        return [Problem(each.override, f"about {size_text(each.total)}; {each.cost}") for each in enough]
    return _together(memory, way)


def _together(memory: Memory, way: Way) -> list[Problem]:
    """Return changes that are enough one upon the other; a later one of the same key stands for the earlier."""
    taken: dict[str, Problem] = {}
    tried: set[str] = set()
    total = memory.estimate(way).total
    while total > memory.room:
        fresh = (each for each in changes(memory, way) if each.override not in tried)
        change = next((each for each in fresh if each.total < total), None)
        if change is None:
            what = f"all of the above together still need about {size_text(total)}"
            mend = "choose a smaller model, or a machine with more memory"
            return [*taken.values(), Problem("model", what, mend)]
        tried.add(change.override)
        memory, way, total = change.memory, change.way, change.total
        key = change.override.partition("=")[0]
        taken.pop(key, None)
        with_others = "with those above, " if taken else ""
        taken[key] = Problem(change.override, f"{with_others}about {size_text(total)}; {change.cost}")
    return list(taken.values())


def changes(memory: Memory, way: Way) -> Iterator[Change]:
    """Yield what can be changed of a run, least harm first."""
    for kind in (_packed, _tokens, _checkpointing, _eval_batch, _train_batch, _bits, _length):
        yield from kind(memory, way)


def _packed(memory: Memory, way: Way) -> Iterator[Change]:
    if way.tokens is None:
        yield Change(
            "engine=packed", "the same numbers, and faster", memory, Way("packed", LEAST_TOKENS, way.checkpointing)
        )


def _tokens(memory: Memory, way: Way) -> Iterator[Change]:
    if way.tokens is not None and way.tokens > LEAST_TOKENS:
        fewer = Way(way.engine, LEAST_TOKENS, way.checkpointing)
        override = f"engine.tokens_per_microbatch={LEAST_TOKENS}"
        yield Change(override, "the same numbers, up to a fifth slower", memory, fewer)


def _checkpointing(memory: Memory, way: Way) -> Iterator[Change]:
    if not way.checkpointing:
        recomputing = Way(way.engine, way.tokens, True)
        yield Change(
            "trainer.gradient_checkpointing=true", "the same numbers, about a third slower", memory, recomputing
        )


def _eval_batch(memory: Memory, way: Way) -> Iterator[Change]:
    if memory.config.trainer.per_device_eval_batch_size > 1:
        changed = _with(memory, trainer={"per_device_eval_batch_size": 1})
        yield Change("trainer.per_device_eval_batch_size=1", "the same numbers, evaluated row by row", changed, way)


def _train_batch(memory: Memory, way: Way) -> Iterator[Change]:
    """Halve the batch of the padded engine; the packed one cuts it by tokens anyway, unless its loss compares rows."""
    trainer = memory.config.trainer
    size, summed = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
    if memory.config.recipe.compares_examples or way.tokens is not None:
        return
    while size % 2 == 0:
        size, summed = size // 2, summed * 2
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": summed}
        override = " ".join(f"trainer.{key}={value}" for key, value in batch.items())
        yield Change(override, "the same batch in more parts", _with(memory, trainer=batch), way)


def _bits(memory: Memory, way: Way) -> Iterator[Change]:
    config = memory.config
    bits = 8 if config.quant.load_in_8bit else 4 if config.quant.load_in_4bit else 16
    if writes_into_base(config.lora):
        return
    for option in (each for each in (8, 4) if each < bits):
        section: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "quant" / f"{option}bit.yaml"))
        changed = memory.of(config.model_copy(update={"quant": QuantConfig.model_validate(section)}))
        yield Change(f"quant={option}bit", "a rougher base, and slower", changed, way)


def _length(memory: Memory, way: Way) -> Iterator[Change]:
    recipe = memory.config.recipe
    limits = recipe.limits["train"]
    length = min(limits.max_length, int(memory.rows.train.sum(axis=1).max())) // 2
    while length >= SHORTEST:
        shorter = with_length(limits, length)
        lengths: dict[str, Any] = {"max_length": length, "max_prompt_length": shorter.max_prompt_length}
        lengths |= {f"eval_{name}": value for name, value in lengths.items()}
        yield Change(f"recipe.max_length={length}", "longer rows are cut", _with(memory, recipe=lengths), way)
        length //= 2


def _with(memory: Memory, **sections: dict[str, Any]) -> Memory:
    """Return the memory of the run with other values of some keys."""
    config: Config = memory.config
    changed = {name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items()}
    return memory.of(config.model_copy(update=changed))
