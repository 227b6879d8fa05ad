"""Rows of every format: one of each to start from, and hypothesis strategies that draw any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from lora_exp.data.kinds import COMPLETION, PREFERENCE, RowKind

Json = dict[str, Any]

texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(str.strip)
trimmed = texts.map(str.strip)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def says(role: str, content: str, **others: Any) -> Json:
    return {"role": role, "content": content, **others}


def user(content: str) -> Json:
    return says("user", content)


def assistant(content: str, **others: Any) -> Json:
    return says("assistant", content, **others)


def system(content: str) -> Json:
    return says("system", content)


def call(name: str = "weather", **arguments: Any) -> Json:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str = "weather") -> Json:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


calls = st.lists(st.builds(call, texts), min_size=1, max_size=2)
"""Tool calls without arguments; `with_calls` has some with."""


@st.composite
def answers(draw: st.DrawFn) -> list[Json]:
    """Draw messages that begin and end with the assistant's, with tool calls and further turns between them."""
    messages = []
    for _ in range(draw(st.integers(0, 2))):
        if draw(st.booleans()):
            arguments = draw(st.dictionaries(texts, json_values, max_size=2))
            made = {"type": "function", "function": {"name": draw(texts), "arguments": arguments}}
            messages += [assistant(draw(st.just("") | texts), tool_calls=[made])]
            messages += [says("tool", draw(st.just("") | texts), name=draw(texts))]
        else:
            messages += [assistant(draw(texts)), user(draw(texts))]
    return [*messages, assistant(draw(texts), **draw(st.sampled_from([{}, {"reasoning_content": "thought"}])))]


@st.composite
def openings(draw: st.DrawFn) -> list[Json]:
    """Draw what comes before an answer: perhaps a system message, perhaps turns, and the user's message."""
    before = [system(draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        before += [user(draw(texts)), assistant(draw(texts))]
    return [*before, user(draw(texts))]


tools = st.lists(st.builds(tool, texts), min_size=1, max_size=2)


@dataclass(frozen=True)
class Example:
    """Rows of a format.

    Args:
        kind: The kind that it is a format of.
        name: Its name.
        row: One row.
        drawn: Pairs of a row and the columns that it becomes.
    """

    kind: RowKind
    name: str
    row: Json
    drawn: st.SearchStrategy[tuple[Json, Json]]


def _same(row: Json) -> tuple[Json, Json]:
    return row, row


def _with_tools(*columns: st.SearchStrategy[Any], names: tuple[str, ...]) -> st.SearchStrategy[tuple[Json, Json]]:
    fields = dict(zip(names, columns, strict=True))
    return (st.fixed_dictionaries(fields) | st.fixed_dictionaries({**fields, "tools": tools})).map(_same)


META = {"source": "tests", "timestamp": "2026-01-05T08:11:00Z", "tags": ["parcel"]}


def _record(question: str, answer: str, context: str | None) -> tuple[Json, Json]:
    inputs = {"question": question, "context": context}
    row = {"id": "1", "schema_version": "1.0", "inputs": inputs, "outputs": {"answer": answer}, "meta": META}
    return row, {"prompt": question if context is None else f"{question}\n\n{context}", "completion": answer}


def _instruction(instruction: str, output: str, given: str | None) -> tuple[Json, Json]:
    row = {"instruction": instruction, "input": given, "output": output}
    prompt = f"{instruction}\n\n{given}" if given and given.strip() else instruction
    return row, {"prompt": prompt, "completion": output}


def _implicit(asked: list[Json], chosen: list[Json], rejected: list[Json]) -> tuple[Json, Json]:
    # An answer that begins as the other does would lend its beginning to the prompt.
    chosen, rejected = [assistant("chosen"), user("and?"), *chosen], [assistant("rejected"), user("and?"), *rejected]
    row = {"chosen": asked + chosen, "rejected": asked + rejected}
    return row, {"prompt": asked, "chosen": chosen, "rejected": rejected}


ASKED = [system("Be short."), user("Where is my parcel?")]
PAIR = {"chosen": [assistant("On its way.")], "rejected": [assistant("No idea.")]}

EXAMPLES = [
    Example(
        COMPLETION,
        "DataRecord",
        _record("Where?", "There.", None)[0],
        st.builds(_record, trimmed, trimmed, st.none() | trimmed),
    ),
    Example(
        COMPLETION,
        "prompt-completion",
        {"prompt": "Where?", "completion": "There."},
        st.fixed_dictionaries({"prompt": texts, "completion": texts}).map(_same),
    ),
    Example(
        COMPLETION,
        "prompt-completion messages",
        {"prompt": ASKED, "completion": [assistant("On its way.")]},
        _with_tools(openings(), answers(), names=("prompt", "completion")),
    ),
    Example(
        COMPLETION,
        "messages",
        {"messages": [*ASKED, assistant("On its way."), user("When?"), assistant("At noon.")]},
        _with_tools(st.builds(lambda asked, told: asked + told, openings(), answers()), names=("messages",)),
    ),
    Example(
        COMPLETION,
        "instruction",
        {"instruction": "Translate.", "input": "oui", "output": "yes"},
        st.builds(_instruction, texts, texts, st.none() | st.just("") | texts),
    ),
    Example(
        PREFERENCE,
        "preference",
        {"prompt": "Where?", "chosen": "There.", "rejected": "No."},
        st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}).map(_same),
    ),
    Example(
        PREFERENCE,
        "preference messages",
        {"prompt": ASKED, **PAIR},
        _with_tools(openings(), answers(), answers(), names=("prompt", "chosen", "rejected")),
    ),
    Example(
        PREFERENCE,
        "implicit-prompt preference messages",
        {side: ASKED + told for side, told in PAIR.items()},
        st.builds(_implicit, openings(), answers(), answers()),
    ),
]
Make = Callable[..., Json]
