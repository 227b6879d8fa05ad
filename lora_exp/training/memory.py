"""When memory runs out: what was used and estimated, what would help, and the next smaller run of the same batch.

Trainer's own `auto_find_batch_size` (accelerate 1.15, `find_executable_batch_size`) takes nine tenths of the batch and
goes on with the weights as they are, from step 0: another batch, another schedule, and some rows twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_exp.config import Config
from lora_exp.errors import Problem, UserError
from lora_exp.machine import free_memory_bytes, is_out_of_memory, peak_memory_bytes

if TYPE_CHECKING:
    from lora_exp.engine.base import Engine, Work
    from lora_exp.run_folder import RunFolder


class OutOfMemory(UserError):  # noqa: N818 - torch has an OutOfMemoryError of its own
    """A run that needs more memory than there is.

    Args:
        title: What was being done.
        problems: What was used, and what helps.
        smaller: The same run with less at a time; None where nothing is left to make smaller.
        change: What is smaller in it, as overrides.
    """

    def __init__(self, title: str, problems: list[Problem], smaller: Config | None, change: str) -> None:
        super().__init__(title, problems)
        self.smaller = smaller
        self.change = change


@dataclass
class MemoryGuard:
    """What is known of a run's memory as it goes on.

    Args:
        config: The run.
        folder: Its folder, which knows the stage.
        engine: How it computes, once that is chosen.
        work: What it computes.
    """

    config: Config
    folder: RunFolder
    engine: Engine | None = None
    work: Work | None = None

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turn a lack of memory into an error with what was used, what was estimated and the mend.

        Raises:
            OutOfMemory: If memory runs out.
        """
        try:
            yield
        except (MemoryError, RuntimeError, OSError, SystemError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._explained(error) from error.with_traceback(None)  # its frames hold the tensors

    def _explained(self, error: BaseException) -> OutOfMemory:
        options = list(self._options())
        smaller, change = next(((config, change) for config, change in options if config is not None), (None, ""))
        mends = "".join(f"\n      {change}" for _, change in options)
        problem = Problem("memory", f"{_wanted(error)}; {self._used()}", f"what helps, the least harm first:{mends}")
        return OutOfMemory(f"memory ran out in the stage {self.folder.current_stage}", [problem], smaller, change)

    def _used(self) -> str:
        if self.engine is None or self.work is None:
            return "the weights do not fit"
        device, forecast = self.work.policy.device, self.work.forecast
        budget = _budget(self.engine, self.work)
        need = forecast.need(self.engine.name, budget, self.work.arguments["gradient_checkpointing"])
        peak, free = peak_memory_bytes(device), free_memory_bytes(device)
        at_once = forecast.tokens_at_once(budget)
        estimate = f"{at_once:,} tokens at a time were estimated to need {_size(need)} in all"
        return f"the run had used up to {_size(peak)}, {_size(free)} are free now, and {estimate}"

    def _options(self) -> Iterator[tuple[Config | None, str]]:
        """Yield what makes the run smaller, in order of least harm, with the config of those that change no result."""
        config, trainer = self.config, self.config.trainer
        if self.engine is not None and self.work is not None:
            budget, rows = _budget(self.engine, self.work), trainer.per_device_train_batch_size
            # Half of what fills it, which may be far less than it holds; what is larger than it cannot be parted.
            if budget is not None and 1 < (at_once := self.work.forecast.tokens_at_once(budget)) <= budget:
                engine = config.engine.model_copy(update={"tokens_per_microbatch": at_once // 2})
                yield config.model_copy(update={"engine": engine}), f"engine.tokens_per_microbatch={at_once // 2}"
            if budget is None and rows > 1:
                fewer = max(size for size in range(1, rows) if rows % size == 0)
                change = {
                    "per_device_train_batch_size": fewer,
                    "gradient_accumulation_steps": trainer.gradient_accumulation_steps * rows // fewer,
                    "per_device_eval_batch_size": min(fewer, trainer.per_device_eval_batch_size),
                }
                yield _with(config, change), " ".join(f"trainer.{key}={value}" for key, value in change.items())
            if not self.work.arguments["gradient_checkpointing"]:
                yield _with(config, {"gradient_checkpointing": True}), "trainer.gradient_checkpointing=true"
        if config.quant.target is None:
            yield None, "quant=8bit, or quant=4bit"
        yield None, f"recipe.max_length={config.recipe.max_length // 2}"


def _budget(engine: Engine, work: Work) -> int | None:
    """Return the tokens of a micro-batch; None where whole batches are computed."""
    chosen = engine.choose_tokens(work.arguments["gradient_checkpointing"], work.forecast)
    return None if chosen is None else int(chosen.value)


def _with(config: Config, change: Mapping[str, object]) -> Config:
    return config.model_copy(update={"trainer": config.trainer.model_copy(update=change)})


def _wanted(error: BaseException) -> str:
    """Return what was asked for last, from the library's own words."""
    if isinstance(error, SystemError):
        return "not even a call of the interpreter found room"
    text = " ".join(str(error).split())
    if found := re.search(r"[Tt]ried to allocate ([\d.]+ [KMG]iB)", text):
        return f"{found[1]} more were asked for"
    if found := re.search(r"tried to allocate (\d+) bytes", text):
        return f"{_size(int(found[1]))} more were asked for"
    return text or type(error).__name__


def _size(number: float) -> str:
    if number < 2**20:
        return f"{number / 2**10:.0f} KiB"
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
