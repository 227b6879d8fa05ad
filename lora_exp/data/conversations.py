"""Rows of messages, as chat templates take them: conversations, and prompts with one answer or two.

The checks cover what templates require of a row. An error names the row's line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

from lora_exp.data.formats import Row, whole_characters

Messages = list[dict[str, Any]]


def _whole_strings(value: Any) -> Any:
    """Refuse half a surrogate pair anywhere inside a JSON value."""
    if isinstance(value, str):
        whole_characters(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _whole_strings(key)
            _whole_strings(inner)
    elif isinstance(value, list):
        for inner in value:
            _whole_strings(inner)
    return value


def _from_json(expected: type, name: str) -> Callable[[Any], Any]:
    """Return a function that reads a string as JSON of the type; anything else is left to the type's own check."""

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            found = json.loads(value, parse_constant=_no_number)
        except ValueError:
            found = None
        if not isinstance(found, expected):
            raise ValueError(f"should be {name}, or one written as JSON")
        return found

    return read


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


JsonObject = Annotated[dict[str, Any], AfterValidator(_whole_strings)]


def _or_none_at_all(value: Any) -> Any:
    return {} if value is None else value


class Function(BaseModel):
    """The function that a tool call names."""

    name: str = Field(min_length=1, description="The function's name.")
    arguments: Annotated[
        JsonObject,
        BeforeValidator(_from_json(dict, "an object"), json_schema_input_type=dict[str, Any] | str),
        BeforeValidator(_or_none_at_all, json_schema_input_type=dict[str, Any] | str),
    ] = Field(default_factory=dict, description="Its arguments: an object, or one written as JSON.")


class ToolCall(BaseModel):
    """What the assistant asks a tool for; `{"name": ..., "arguments": ...}` alone is taken for its function."""

    id: str | None = Field(None, description="What the tool's message names it by; some templates ask for it.")
    type: Literal["function"] = "function"
    function: Function

    def plain(self) -> dict[str, Any]:
        """Return it as a template takes it, without an id that is null."""
        named = {} if self.id is None else {"id": self.id}
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {**named, "type": self.type, "function": function}

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("function") is None and "name" in value:
            return {"function": value}
        return value


Problems = list[tuple[tuple[str | int, ...], str]]
"""Places in a row or a message, each with what is wrong there."""


def _refuse(model: BaseModel, problems: Problems) -> None:
    """Raise pydantic's error for places inside a model, which a validator of the whole cannot name otherwise."""
    if problems:
        details = [
            InitErrorDetails(type=PydanticCustomError("conversation", "{what}", {"what": what}), loc=loc, input=None)
            for loc, what in problems
        ]
        raise ValidationError.from_exception_data(type(model).__name__, details)


class Message(BaseModel):
    """One message. Keys beyond these (`name`, `tool_call_id`, `reasoning_content`) go to the template as they are."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "user", "assistant", "tool"] = Field(description="Who speaks.")
    content: Annotated[str, AfterValidator(whole_characters)] | None = Field(
        None, description="What is said; may be missing where there are tool calls."
    )
    tool_calls: list[ToolCall] | None = Field(None, description="What the assistant asks tools for.")

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.model_extra:
            _whole_strings(self.model_extra)
        _refuse(self, self._problems())
        return self

    def _problems(self) -> Problems:
        if self.model_extra and self.model_extra.get("weight") not in (None, 1):
            return [(("weight",), "is not supported: all that the assistant says is learned")]
        if self.tool_calls:
            wrong = self.role != "assistant"
            return [(("tool_calls",), f"only the assistant calls tools, not the {self.role}")] if wrong else []
        if self.content is None:
            return [(("content",), "is missing")]
        # A tool may have nothing to say.
        return [(("content",), "is empty")] if self.role != "tool" and not self.content.strip() else []

    def plain(self) -> dict[str, Any]:
        """Return it as a template takes it: with content, empty beside tool calls, and without keys that are null."""
        others = {key: value for key, value in (self.model_extra or {}).items() if value is not None}
        calls = {"tool_calls": [call.plain() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": self.role, "content": self.content or "", **calls, **others}


Conversation = Annotated[list[Message], Field(min_length=1)]


def _plain(messages: Iterable[Message]) -> Messages:
    return [message.plain() for message in messages]


def _order(name: str, messages: list[Message], before: list[Message] | None = None) -> Problems:
    """Find messages out of place.

    Args:
        name: The key that the messages stand under.
        messages: The messages.
        before: The prompt that they answer; None where they open the conversation themselves.
    """
    problems: Problems = []
    previous = before[-1].role if before else None
    for index, message in enumerate(messages):
        role, place = message.role, (name, index, "role")
        if role == "system" and previous is not None:
            first = previous == "system" and index == 1
            problems.append((place, "is a second system message" if first else "a system message stands first"))
        elif role == "tool" and previous not in ("assistant", "tool"):
            problems.append((place, "a tool answers the assistant, whose message is not before it"))
        elif role == "assistant" and previous is None:
            problems.append((place, "the assistant has nothing to answer: somebody else speaks first"))
        previous = role
    return problems


def _prompt(name: str, messages: list[Message]) -> Problems:
    problems = _order(name, messages)
    if messages[-1].role == "assistant":
        problems.append(((name, len(messages) - 1, "role"), "a prompt cannot end with the assistant's message"))
    return problems


def _answer(name: str, messages: list[Message], prompt: list[Message]) -> Problems:
    problems = _order(name, messages, prompt)
    if messages[0].role != "assistant":
        problems.append(
            ((name, 0, "role"), f"an answer begins with the assistant's message, not the {_of(messages[0])}")
        )
    return problems + _ending(name, messages)


def _ending(name: str, messages: list[Message]) -> Problems:
    if messages[-1].role == "assistant":
        return []
    place = (name, len(messages) - 1, "role")
    return [(place, f"the last message should be the assistant's, not the {_of(messages[-1])}")]


def _of(message: Message) -> str:
    return f"{message.role}'s"


def _tools(tools: list[Any]) -> list[Any]:
    """Refuse a tool that has no name, which no template can show."""
    for number, tool in enumerate(tools):
        inner = tool.get("function", tool)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise ValueError(f"the tool at {number} has no name")
    return tools


Tools = Annotated[
    list[JsonObject],
    BeforeValidator(_from_json(list, "a list of JSON schemas"), json_schema_input_type=list[dict[str, Any]] | str),
    AfterValidator(_tools),
]
AnyTools = Annotated[
    Tools | None, Field(description="JSON schemas of the tools that may be called: a list, or one written as JSON.")
]


def _with_tools(columns: dict[str, Any], tools: list[Any] | None) -> dict[str, Any]:
    return {**columns, "tools": tools} if tools else columns


class MessagesRow(Row):
    """A conversation: TRL's conversational language modeling format."""

    marks = {"messages": list}
    messages: Conversation = Field(description="The conversation; the loss is on every message of the assistant.")
    tools: AnyTools = None

    @model_validator(mode="after")
    def _check(self) -> MessagesRow:
        name, messages = "messages", self.messages
        _refuse(self, _order(name, messages) + _ending(name, messages))
        return self

    def columns(self) -> dict[str, Any]:
        """Return `messages`."""
        return _with_tools({"messages": _plain(self.messages)}, self.tools)


class CompletionMessagesRow(Row):
    """A prompt and its completion as lists of messages."""

    marks = {"prompt": list, "completion": list}
    prompt: Conversation = Field(description="What was said before.")
    completion: Conversation = Field(description="The answer; the loss is on the assistant's messages in it.")
    tools: AnyTools = None

    @model_validator(mode="after")
    def _check(self) -> CompletionMessagesRow:
        _refuse(self, _prompt("prompt", self.prompt) + _answer("completion", self.completion, self.prompt))
        return self

    def columns(self) -> dict[str, Any]:
        """Return `prompt` and `completion`."""
        return _with_tools({"prompt": _plain(self.prompt), "completion": _plain(self.completion)}, self.tools)


class PreferenceMessagesRow(Row):
    """A prompt with two answers as lists of messages."""

    marks = {"prompt": list, "chosen": list, "rejected": list}
    prompt: Conversation = Field(description="What was said before.")
    chosen: Conversation = Field(description="The answer that was preferred.")
    rejected: Conversation = Field(description="The answer that was not.")
    tools: AnyTools = None

    @model_validator(mode="after")
    def _check(self) -> PreferenceMessagesRow:
        problems = _prompt("prompt", self.prompt)
        problems += _answer("chosen", self.chosen, self.prompt)
        problems += _answer("rejected", self.rejected, self.prompt)
        _refuse(self, problems)
        return self

    def columns(self) -> dict[str, Any]:
        """Return `prompt`, `chosen` and `rejected`."""
        columns = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return _with_tools({name: _plain(messages) for name, messages in columns.items()}, self.tools)


class ImplicitPreferenceRow(Row):
    """Two conversations that begin alike: the prompt is what they share, as TRL's `extract_prompt` has it."""

    marks = {"chosen": list, "rejected": list}
    chosen: Conversation = Field(description="The conversation with the answer that was preferred.")
    rejected: Conversation = Field(description="The conversation with the answer that was not.")
    tools: AnyTools = None

    @model_validator(mode="after")
    def _check(self) -> ImplicitPreferenceRow:
        problems: Problems = []
        for name, messages in (("chosen", self.chosen), ("rejected", self.rejected)):
            problems += _order(name, messages) + _ending(name, messages)
        _refuse(self, problems or self._parting())
        return self

    @property
    def shared(self) -> int:
        """How many messages the prompt has; of two equal conversations, all but the last."""
        pairs = enumerate(zip(self.chosen, self.rejected, strict=False))
        parting = next((index for index, (one, other) in pairs if one != other), None)
        return len(self.chosen) - 1 if parting is None else parting

    def _parting(self) -> Problems:
        """Find what keeps the two from being answers to one prompt."""
        parting = self.shared
        if parting == 0:
            return [(("chosen", 0), "is not the first message of rejected: the two share no prompt")]
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        shorter = min(map(len, sides.values()))
        if self.chosen[:shorter] == self.rejected[:shorter] and len(self.chosen) != len(self.rejected):
            longer = max(sides, key=lambda name: len(sides[name]))
            return [((longer, shorter), "goes on where the other ends: the two are no answers to one prompt")]
        return [
            (
                (name, parting, "role"),
                f"here the two part, so it should be the assistant's, not the {_of(side[parting])}",
            )
            for name, side in sides.items()
            if side[parting].role != "assistant"
        ]

    def columns(self) -> dict[str, Any]:
        """Return `prompt`, `chosen` and `rejected`."""
        chosen, rejected, shared = _plain(self.chosen), _plain(self.rejected), self.shared
        columns = {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
        return _with_tools(columns, self.tools)
