"""DataRecord: a question, perhaps with context, and its answer. SCHEMA.md documents it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StringConstraints, TypeAdapter, ValidationError

from lora_exp.data.formats import Row, whole_characters

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(whole_characters)]
"""A string that is not empty once trimmed."""

_datetime = TypeAdapter(datetime)


def _iso_8601(value: str) -> str:
    """Accept `2026-01-05`, `2026-01-05T08:11:00Z`, with offset or fraction; refuse numbers and other orders."""
    try:
        if value[4:5] != "-":
            raise ValueError
        _datetime.validate_python(value)
    except (ValidationError, ValueError):
        raise ValueError(f"{value!r} is not an ISO 8601 time such as 2026-01-05T08:11:00Z") from None
    return value


def _written(value: Any) -> Any:
    """Write a time out: `load_dataset` makes one of a string that looks like it."""
    return value.isoformat() if isinstance(value, datetime) else value


class Inputs(BaseModel):
    """What the model is asked."""

    question: Text = Field(description="The question or instruction.")
    context: Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(whole_characters)] | None = Field(
        None, description="What the answer rests on; stands under the question in the prompt."
    )


class Outputs(BaseModel):
    """What the model should learn to say."""

    answer: Text = Field(description="The answer; the loss is on its tokens alone.")


class Meta(BaseModel):
    """Where the row comes from."""

    source: Text = Field(description="Who or what made the row.")
    timestamp: Annotated[
        str,
        BeforeValidator(_written),
        StringConstraints(strip_whitespace=True),
        AfterValidator(_iso_8601),
        Field(description="When, as ISO 8601.", json_schema_extra={"format": "date-time"}),
    ]
    tags: list[Text] = Field(description="Labels; the list may be empty.")


class DataRecord(Row):
    """A question, perhaps with context, and its answer."""

    marks = {"inputs": dict, "outputs": dict}
    id: Text = Field(description="The row's own name.")
    schema_version: Literal["1.0"] = Field(description="The version of this schema.")
    inputs: Inputs
    outputs: Outputs
    meta: Meta

    def columns(self) -> dict[str, Any]:
        """Return `prompt` (the question, and under it the context where there is one) and `completion`."""
        parts = [self.inputs.question, self.inputs.context]
        return {"prompt": "\n\n".join(part for part in parts if part), "completion": self.outputs.answer}
