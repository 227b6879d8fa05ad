"""Rows through a tokenizer's chat template, as texts, with the places where the assistant's messages begin and end.

Where a message begins and ends is proved on each row, not taken from what templates usually do: the conversation up to
the message and the conversation with it are rendered too, and must be prefixes of the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_exp.data.conversations import Messages
from lora_exp.errors import count

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what the assistant says, for `return_assistant_tokens_mask` (transformers 5.23)."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that templates show beside its content."""

BEFORE = "the chat template changes what comes before this message once the message is there"
AFTER = "the chat template changes this message once more follows, so its tokens in the conversation are not known"


class RefusedError(Exception):
    """A row that a template cannot take, or whose tokens cannot be told apart.

    Args:
        what: What is wrong, the same words for every row that has it.
        place: Where in the row.
        mend: What helps, as a key of `lora_exp.data.template.MENDS`.
    """

    def __init__(self, what: str, place: str, mend: str) -> None:
        super().__init__(f"{place}: {what}")
        self.what, self.place, self.mend = what, place, mend


@dataclass(frozen=True)
class Exchange:
    """What was asked, and the answers that are learned from, as messages.

    Args:
        asked: The messages before the first one that is learned from.
        answers: By column; each begins and ends with the assistant's message.
        tools: JSON schemas.
        one_list: Whether the row was one list of messages.
    """

    asked: Messages
    answers: dict[str, Messages]
    tools: list[Any] | None = None
    one_list: bool = False

    @classmethod
    def of(cls, row: Mapping[str, Any], answers: Sequence[str]) -> Exchange:
        """Read the columns of `lora_exp.data.formats.Row`; a string is the only message of its side."""
        tools = row.get("tools") or None
        if "messages" in row:
            messages = row["messages"]
            first = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
            return cls(messages[:first], {answers[0]: messages[first:]}, tools, True)
        told = {name: _messages("assistant", row[name]) for name in answers}
        return cls(_messages("user", row["prompt"]), told, tools)

    def place(self, name: str, index: int) -> str:
        """Return where in the row a message stands: `messages.3`, `completion.0`; counted from the answer's first."""
        if self.one_list:
            return f"messages.{len(self.asked) + index}"
        return f"{name}.{index}" if index >= 0 else f"prompt.{len(self.asked) + index}"


def _messages(role: str, value: str | Messages) -> Messages:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


@dataclass(frozen=True)
class Span:
    """An assistant's message: where it begins and ends in the text of the conversation, and its place in the row."""

    begin: int
    end: int
    place: str


@dataclass(frozen=True)
class Rendered:
    """A row as the template shows it.

    Args:
        prompt: What was asked, with what asks the assistant to speak.
        wholes: Prompt and answer, for each answer.
        spans: The assistant's messages of the only answer, where others stand between them or the template marks them;
            empty where all that follows the prompt is learned.
    """

    prompt: str
    wholes: list[str]
    spans: list[Span]


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: It must have one.
        answers: The columns that are learned from. Of a single one the loss is on the assistant's messages; of two,
            which are compared, it is on all that follows the prompt, as TRL's DPOTrainer has it.
    """

    def __init__(self, tokenizer: Any, answers: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.answers = answers

    def render(self, row: Mapping[str, Any]) -> Rendered:
        """Return the texts of a row.

        Raises:
            RefusedError: If the template refuses the row, leaves a part of it out, or shows what comes before an answer
                otherwise once the answer is there.
        """
        exchange = Exchange.of(row, self.answers)
        prompt = self._text(exchange, exchange.asked, ask=True)
        wholes = []
        for name, answer in exchange.answers.items():
            whole = self._text(exchange, exchange.asked + answer)
            self._require_asked(exchange, name, whole)
            _require_said(exchange, name, answer, _after(prompt, whole))
            wholes.append(whole)
        marked = self._marked_template(exchange)
        if marked:
            return Rendered(prompt, wholes, self._marked_spans(exchange, marked))
        for name, whole in zip(exchange.answers, wholes, strict=True):
            self._require_start(exchange, name, whole, prompt)
        return Rendered(prompt, wholes, self._proved_spans(exchange, prompt, wholes[0]))

    def _text(self, exchange: Exchange, messages: Messages, ask: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=exchange.tools, tokenize=False, add_generation_prompt=ask
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            # Templates raise the first on purpose; the others come of a key or a type that they do not expect.
            what = f"the chat template refuses it: {str(error) or type(error).__name__}"
            raise RefusedError(what, "messages" if exchange.one_list else "prompt", "refused") from error
        assert isinstance(text, str)
        return text

    def _require_start(self, exchange: Exchange, name: str, whole: str, prompt: str) -> None:
        """Check that the prompt is the same with and without its answer.

        What asks the assistant to speak may differ from how its message begins: some models are asked with an opened
        thought, and remember without it.
        """
        if not whole.startswith(prompt) and not whole.startswith(self._text(exchange, exchange.asked)):
            raise RefusedError(BEFORE, exchange.place(name, 0), "rewritten")

    def _require_asked(self, exchange: Exchange, name: str, whole: str) -> None:
        """Check that the template shows the tools and what the system and the user say."""
        for index, tool in enumerate(exchange.tools or ()):
            if not _shows(whole, tool.get("function", tool)["name"]):
                raise RefusedError("the chat template leaves out the tools", f"tools.{index}", "left out")
        said = exchange.asked + exchange.answers[name]
        for index, message in enumerate(said):
            if message["role"] not in ("system", "user") or _shows(whole, message["content"]):
                continue
            # Some templates read a setting out of it instead of showing it; then another text makes a difference.
            other = {**message, "content": "something else"}
            if self._text(exchange, [*said[:index], other, *said[index + 1 :]]) == whole:
                what = f"the chat template leaves out what the {message['role']} says"
                raise RefusedError(what, exchange.place(name, index - len(exchange.asked)), "left out")

    def _marked_template(self, exchange: Exchange) -> str | None:
        """Return the template if it marks what the assistant says and the row has messages that must be told apart."""
        template = self.tokenizer.get_chat_template(tools=exchange.tools)
        apart = exchange.one_list or self._has_turns(exchange)
        return template if apart and GENERATION.search(template) else None

    def _has_turns(self, exchange: Exchange) -> bool:
        return len(self.answers) == 1 and len(exchange.answers[self.answers[0]]) > 1

    def _marked_spans(self, exchange: Exchange, template: str) -> list[Span]:
        """Return the assistant's messages as the template marks them."""
        from transformers.utils.chat_template_utils import render_jinja_template

        ((name, answer),) = exchange.answers.items()
        messages = exchange.asked + answer
        _, (marks,) = render_jinja_template(
            conversations=[messages],
            tools=exchange.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        marks = _joined(marks)
        said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marks) != len(said):
            marked, times = count(len(marks), "place"), count(len(said), "time")
            what = f"the chat template marks {marked} as the assistant's, who speaks {times}"
            raise RefusedError(what, exchange.place(name, 0), "marks")
        first = len(exchange.asked)
        return [
            Span(begin, end, exchange.place(name, index - first))
            for index, (begin, end) in zip(said, marks, strict=True)
            if index >= first
        ]

    def _proved_spans(self, exchange: Exchange, prompt: str, whole: str) -> list[Span]:
        """Return the assistant's messages of an answer that has others between them."""
        if not self._has_turns(exchange):
            return []
        ((name, answer),) = exchange.answers.items()
        spans = []
        for index, message in enumerate(answer):
            if message["role"] != "assistant":
                continue
            before, place = exchange.asked + answer[:index], exchange.place(name, index)
            begin = self._text(exchange, before, ask=True) if index else prompt
            end = self._text(exchange, [*before, message])
            if not whole.startswith(begin):
                raise RefusedError(BEFORE, place, "rewritten")
            if not whole.startswith(end):
                raise RefusedError(AFTER, place, "rewritten")
            spans.append(Span(len(begin), len(end), place))
        return spans


def _joined(marks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join places that touch: some templates mark what a message says and what ends it one by one."""
    joined: list[tuple[int, int]] = []
    for begin, end in marks:
        if joined and joined[-1][1] == begin:
            begin = joined.pop()[0]
        joined.append((begin, end))
    return joined


def _after(prompt: str, whole: str) -> str:
    return whole[len(prompt) :] if whole.startswith(prompt) else whole


def _require_said(exchange: Exchange, name: str, answer: Messages, text: str) -> None:
    """Check that the template shows all that the assistant says, thinks and calls."""
    for index, message in enumerate(answer):
        if message["role"] != "assistant":
            continue
        parts = [(key, message.get(key)) for key in ("content", *REASONING)]
        parts += [("tool_calls", call["function"]["name"]) for call in message.get("tool_calls") or ()]
        missing = [key for key, part in parts if isinstance(part, str) and not _shows(text, part)]
        if missing:
            what = f"the chat template leaves out the assistant's {missing[0]}"
            raise RefusedError(what, f"{exchange.place(name, index)}.{missing[0]}", "left out")


def _shows(text: str, part: str) -> bool:
    """Whether a text has the part in it, blanks aside: templates trim, and set thoughts on lines of their own."""
    if part.strip() in text:
        return True
    bare = "".join(text.split())
    return any("".join(each.split()) in bare for each in (part, json.dumps(part, ensure_ascii=False)[1:-1]))


def texts(row: Mapping[str, Any], answer: str) -> tuple[str, str]:
    """Return a row's prompt and one of its answers as a person reads them.

    Strings as they are, and so a prompt of one message; of several messages each with who speaks. The answer to a
    prompt of messages is the first of the assistant's that is learned from.
    """
    exchange = Exchange.of(row, (answer,))
    asked = [_words(message) for message in exchange.asked]
    if len(asked) > 1:
        asked = [f"{message['role']}: {text}" for message, text in zip(exchange.asked, asked, strict=True)]
    return "\n\n".join(asked), _words(exchange.answers[answer][0])


def _words(message: Mapping[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    said = [message["content"]] if message.get("content") else []
    asked = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in calls]
    return "\n".join(said + asked)
