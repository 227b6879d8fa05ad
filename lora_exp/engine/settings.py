"""Settings that suit the machine: how many tokens at a time, and whether activations must be recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens a micro-batch where memory is plenty. A processor's products run at full rate from some hundred rows on; a
GPU wants more. More costs memory and gains nothing."""
LEAST_TOKENS = 256

SHARE = 0.8
"""Of the room that a run fills by itself; the rest is for what an estimate misses, and for other programs."""


class Forecast(Protocol):
    """What is known of a run's memory before it starts.

    Attributes:
        device: Where it trains.
        room: Bytes that it may fill in all.
    """

    device: Any
    room: int

    def need(self, engine: str, tokens: int | None, checkpointing: bool) -> int:
        """Return the bytes that it fills.

        Args:
            engine: The engine's name.
            tokens: Of a micro-batch; None for whole batches.
            checkpointing: Whether activations are recomputed.
        """

    def tokens_at_once(self, tokens: int | None) -> int:
        """Return the tokens of the largest batch that training computes at once.

        Args:
            tokens: Of a micro-batch; None for whole batches.
        """

    def require(self, engine: str, tokens: int | None, checkpointing: bool) -> None:
        """Check that this fits.

        Raises:
            UserError: If it cannot.
        """


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the reason for people."""

    value: Any
    reason: str


def choose_tokens(
    wanted: int | Literal["auto"], engine: str, checkpointing: bool | Literal["auto"], forecast: Forecast
) -> Choice:
    """Return `engine.tokens_per_microbatch`: as many as use the device fully and fit into its free memory.

    Args:
        wanted: The config's.
        engine: The engine's name.
        checkpointing: The config's `trainer.gradient_checkpointing`.
        forecast: The run's.
    """
    if wanted != "auto":
        return Choice(wanted, f"engine.tokens_per_microbatch={wanted}")
    usual = TOKENS.get(forecast.device.type, TOKENS["cuda"])
    room = SHARE * forecast.room
    most = forecast.need(engine, usual, checkpointing is True)
    if most <= room:
        return Choice(usual, "more would not be faster")
    least = forecast.need(engine, LEAST_TOKENS, checkpointing is True)
    # A token costs a little more among more of them, so a straight line between the two errs to the safe side.
    fitting = LEAST_TOKENS + int((usual - LEAST_TOKENS) * (room - least) / max(most - least, 1))
    return Choice(max(LEAST_TOKENS, min(fitting, usual)), f"what {size_text(forecast.room)} hold")


def choose_checkpointing(wanted: bool | Literal["auto"], engine: str, tokens: int | None, forecast: Forecast) -> Choice:
    """Return `trainer.gradient_checkpointing`: off when the run fits without it.

    Args:
        wanted: The config's.
        engine: The engine's name.
        tokens: Of its micro-batch, if it has any.
        forecast: The run's.
    """
    need = forecast.need(engine, tokens, wanted is True)
    there = f"{size_text(forecast.room)} there are"
    if wanted != "auto":
        return Choice(
            wanted, f"trainer.gradient_checkpointing={str(wanted).lower()}; about {size_text(need)} of the {there}"
        )
    if need <= SHARE * forecast.room:
        return Choice(False, f"the run needs about {size_text(need)} of the {there}")
    return Choice(True, f"the run would need about {size_text(need)}, and {there}")


def size_text(number: float) -> str:
    """Return bytes as people read them."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
