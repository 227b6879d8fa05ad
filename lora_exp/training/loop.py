"""Build the trainer, train, evaluate."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.config import Config
from lora_exp.engine.base import Engine, Work
from lora_exp.errors import Problem, UserError, raised_here
from lora_exp.reports import console
from lora_exp.reports.console import TrainingDisplay
from lora_exp.run_folder import RunFolder
from lora_exp.search.pruning import SearchTrial
from lora_exp.tracking.base import ActiveRun
from lora_exp.training.arguments import training_arguments
from lora_exp.training.callbacks import Display, Leaving, MetricsFile, Pruning, SaveAfterEvaluation, TrackerFeed
from lora_exp.training.interrupt import Interrupts
from lora_exp.training.watch import RowNames

if TYPE_CHECKING:
    from lora_exp.data.tokenize import TokenizedData
    from lora_exp.engine.settings import Forecast
    from lora_exp.models.policy import Policy


def choose_engine(
    config: Config, folder: RunFolder, policy: Policy, data: TokenizedData, forecast: Forecast
) -> tuple[Engine, Work]:
    """Settle what the machine decides: the engine and its micro-batch, gradient checkpointing. Each is said aloud."""
    from lora_exp.engine.settings import choose_checkpointing

    arguments = training_arguments(config, policy.precision, folder.checkpoints, policy.device.type == "cpu")
    work = Work(policy, config.recipe, arguments, data.longest_row, forecast)
    engine, line = config.engine.suited_to(work)
    console.say("engine", line)
    wanted = config.trainer.gradient_checkpointing
    tokens = engine.choose_tokens(wanted, forecast)
    checkpointing = choose_checkpointing(wanted, engine.name, tokens.value if tokens else None, forecast)
    arguments["gradient_checkpointing"] = checkpointing.value
    forecast.require(engine.name, tokens.value if tokens else None, checkpointing.value)
    console.say("memory", f"activations {'recomputed' if checkpointing.value else 'kept'}: {checkpointing.reason}")
    return engine, work


def make_trainer(
    config: Config, folder: RunFolder, engine: Engine, work: Work, data: TokenizedData, tracker: ActiveRun
) -> Any:
    """Return the recipe's trainer with our callbacks in place of the library's printing.

    Raises:
        UserError: If transformers or TRL refuse a value that we hand through.
    """
    from transformers import PrinterCallback

    callbacks = [
        MetricsFile(folder.path / "metrics.jsonl"),
        TrackerFeed(tracker),
        SaveAfterEvaluation(),
        Display(TrainingDisplay(config.recipe.headline)),
    ]
    try:
        trainer = config.recipe.trainer(engine, work.policy, data.tokenizer, data.datasets, work.arguments, callbacks)
    except (ValueError, TypeError, NotImplementedError) as error:
        if raised_here(error):
            raise
        problem = Problem("trainer or recipe", str(error))
        raise UserError(f"{config.recipe.library_class} refuses the config", [problem]) from error
    trainer.remove_callback(PrinterCallback)
    trainer.zero_loss = config.recipe.zero_loss
    trainer.starts_alike = work.policy.starts_at_reference
    trainer.rows = RowNames(data, config.recipe.row_kind.answers)
    engine.equip(trainer, work)
    return trainer


def train(trainer: Any, checkpoint: Path | None) -> dict[str, float]:
    """Train, from a checkpoint where one is given, and return Trainer's summary.

    Raises:
        UserError: If a file of the checkpoint holds more than numbers: it is not unpickled.
    """
    try:
        output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except pickle.UnpicklingError as error:
        what = "a file of it holds more than numbers, which no run writes: it may carry foreign code, and is not read"
        mend = "delete that folder, and the checkpoint before it is used"
        raise UserError("the checkpoint is not one of this run", [Problem(str(checkpoint), what, mend)]) from error
    finally:  # Trainer tells its callbacks of an end only where it ends well
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Display):
                callback.display.stop()
    return dict(output.metrics)


def leave_on_signal(interrupts: Interrupts, trainer: Any) -> None:
    """Have a run write a checkpoint and leave where it is asked to; after everyone else has seen the step."""
    trainer.add_callback(Leaving(interrupts, trainer))


def report_to(trial: SearchTrial, trainer: Any, objective: str) -> None:
    """Have a search told of every evaluation, after everyone else; it may end the run (`Pruned`)."""
    trainer.add_callback(Pruning(trial, objective))


def evaluate(trainer: Any, has_eval_data: bool) -> dict[str, float]:
    """Return the evaluation metrics of the model as it is now, without computing them twice."""
    if not has_eval_data:
        return {}
    last = next((logs for logs in reversed(trainer.state.log_history) if "eval_loss" in logs), None)
    # With load_best_model_at_end the model is no longer the one of the last step.
    if last is not None and last["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {name: value for name, value in last.items() if name.startswith("eval_")}
    return dict(trainer.evaluate())
