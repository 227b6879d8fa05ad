"""Checkpoints that are whole, and those of a run that is asked to leave. Read in transformers 5.23, `trainer.py`.

Trainer writes a checkpoint in its place, file by file, and deletes an old one when the last file is closed: a kill or
a full disk can leave a part of the new one and nothing of the old.
"""

from __future__ import annotations

import random
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import rotate_checkpoints

from lora_exp.disk import writing
from lora_exp.errors import Problem, UserError
from lora_exp.recipes.totals import Totals
from lora_exp.training.checkpoints import STATE
from lora_exp.training.integrity import damage, staged


class EvaluationLeft(Exception):  # noqa: N818 - no error: a run that is asked to leave cuts an evaluation short
    """Raised between two batches of an evaluation."""


class WholeCheckpoints:
    """Mixed in before a trainer with `CarriedTotals`: a checkpoint is in its place once it is whole and on the disk.

    An evaluation that a run leaves undone is noted in its last checkpoint, and made first when it goes on.
    """

    totals: Totals
    _part: Path | None = None
    """Where a checkpoint is being written."""
    _end: tuple[Any, ...] | None = None
    """The training's last moment, before its summary: state, sums, random states."""

    def _get_output_dir(self, trial: Any) -> str:
        """Return where checkpoints are looked for, and where one is written for now."""
        return str(self._part or super()._get_output_dir(trial))  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write beside the place, seal, move; only then may an older one be deleted."""
        state = self.state
        args = self.args  # type: ignore[attr-defined]
        checkpoints = Path(args.output_dir)
        place = checkpoints / f"checkpoint-{state.global_step}"
        with writing("the checkpoint", place, checkpoints.parent), staged(place) as part:
            self._part = part.parent
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._part = None
            if state.best_global_step:
                best = checkpoints / f"checkpoint-{state.best_global_step}"
                if best == place or best.is_dir():
                    state.best_model_checkpoint = str(best)
                    state.save_to_json(part / STATE)
        rotate_checkpoints(str(checkpoints), args.save_total_limit, state.best_model_checkpoint)

    def _load_best_model(self) -> None:
        """Load the best checkpoint, if it is what was written.

        Raises:
            UserError: If it is not.
        """
        best = Path(self.state.best_model_checkpoint)
        reason = damage(best)
        if reason is not None:
            problem = Problem(str(best), f"the best checkpoint is damaged: {reason}", "load_best_model_at_end=false")
            raise UserError("the best model cannot be loaded", [problem])
        super()._load_best_model()  # type: ignore[misc]

    # An evaluation that is cut short -----------------------------------------------------------------

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Evaluate; where that is cut short, write the checkpoint of the moment before."""
        before = _random_states()
        save = self.control.should_save  # type: ignore[has-type]
        try:
            found: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)  # type: ignore[misc]
            return found
        except EvaluationLeft:
            _set_random_states(before)  # a loader draws from them as it starts
            self.totals.due = ["evaluation", *(["save"] if save else [])]
            self._save_checkpoint(self.model, trial)  # type: ignore[attr-defined]
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)  # type: ignore
            raise

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Bring the random states to where they were, and make the evaluation that was due there."""
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        self._evaluate_what_is_due()

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Evaluate first, where the last step of all was left without."""
        self._evaluate_what_is_due()
        self._end = deepcopy(self.state), self.totals.state()["attributes"], _random_states()
        return super()._finalize_training(trial, num_train_samples, start_time)  # type: ignore[misc]

    def checkpoint_of_end(self) -> Path | None:
        """Return the checkpoint of the last step, written now where none was asked for.

        Returns:
            Its folder; None while the training goes on, and where the weights are no longer the last but the best.
        """
        if self._end is None:
            return None
        args = self.args  # type: ignore[attr-defined]
        self.state, sums, random_states = self._end
        place = Path(args.output_dir) / f"checkpoint-{self.state.global_step}"
        if not place.is_dir():
            if args.load_best_model_at_end:
                return None
            self.totals.ended = sums
            _set_random_states(random_states)
            self._save_checkpoint(self.model, None)  # type: ignore[attr-defined]
        return place

    def _evaluate_what_is_due(self) -> None:
        due, self.totals.due = self.totals.due, []
        if not due:
            return
        control = self.control
        control.should_log, control.should_evaluate, control.should_save = False, True, "save" in due
        self._maybe_log_save_evaluate(  # type: ignore[attr-defined]
            self._tr_loss,  # type: ignore[attr-defined]
            None,
            self.model,  # type: ignore[attr-defined]
            None,
            self.state.epoch,
            None,
            time.time(),
        )


def _random_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_states(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
