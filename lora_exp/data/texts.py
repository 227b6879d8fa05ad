"""Rows of strings: prompt and completion, instruction and output, a prompt with two answers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from lora_exp.data.formats import Row, VerbatimText, whole_characters


class CompletionRow(Row):
    """A prompt and its completion: TRL's prompt-completion format."""

    marks = {"prompt": str, "completion": str}
    prompt: VerbatimText = Field(description="What was asked.")
    completion: VerbatimText = Field(description="The answer; the loss is on its tokens alone.")

    def columns(self) -> dict[str, Any]:
        """Return `prompt` and `completion`."""
        return {"prompt": self.prompt, "completion": self.completion}


class InstructionRow(Row):
    """An instruction, perhaps with an input, and its output: the format of Alpaca's data."""

    marks = {"instruction": str, "output": str}
    instruction: VerbatimText = Field(description="The question or instruction.")
    input: Annotated[str, AfterValidator(whole_characters)] | None = Field(
        None, description="What it is about; stands under the instruction in the prompt."
    )
    output: VerbatimText = Field(description="The answer; the loss is on its tokens alone.")

    def columns(self) -> dict[str, Any]:
        """Return `prompt` (the instruction, and under it the input where there is one) and `completion`."""
        parts = [self.instruction, self.input]
        prompt = "\n\n".join(part for part in parts if part and part.strip())
        return {"prompt": prompt, "completion": self.output}


class PreferenceRow(Row):
    """A prompt with two answers."""

    marks = {"prompt": str, "chosen": str, "rejected": str}
    prompt: VerbatimText = Field(description="What was asked.")
    chosen: VerbatimText = Field(description="The answer that was preferred.")
    rejected: VerbatimText = Field(description="The answer that was not.")

    def columns(self) -> dict[str, Any]:
        """Return `prompt`, `chosen` and `rejected`."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
