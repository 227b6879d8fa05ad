"""What is wrong with a row of messages is told with the place where it is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_exp.data.cache import NO_CACHE
from lora_exp.data.conversations import ImplicitPreferenceRow, MessagesRow
from lora_exp.data.kinds import COMPLETION, PREFERENCE, RowKind
from lora_exp.data.read import read_files
from lora_exp.errors import UserError
from tests.rows import assistant, call, says, system, tool, user

Json = dict[str, Any]
ASKED, TOLD = user("Where is my parcel?"), assistant("On its way.")
CALLS = assistant("", tool_calls=[call(city="Oslo")])
RESULT = says("tool", "rain")


def messages(*said: Any, **others: Any) -> Json:
    return {"messages": list(said), **others}


def completion(prompt: Any, told: Any) -> Json:
    return {"prompt": prompt, "completion": told}


def pair(prompt: Any, chosen: Any, rejected: Any) -> Json:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def implicit(chosen: Any, rejected: Any) -> Json:
    return {"chosen": chosen, "rejected": rejected}


def calling(**function: Any) -> Json:
    return messages(ASKED, assistant("", tool_calls=[{"type": "function", "function": function}]))


GOOD = {
    "one turn": messages(ASKED, TOLD),
    "system": messages(system("Be short."), ASKED, TOLD),
    "several turns": messages(ASKED, TOLD, user("When?"), assistant("Now.")),
    "the assistant greets": messages(system("Greet."), assistant("Hello."), ASKED, TOLD),
    "the same speaker twice": messages(ASKED, ASKED, TOLD, TOLD),
    "tool calls": messages(ASKED, CALLS, RESULT, RESULT, TOLD, tools=[tool()]),
    "tool calls without content": messages(ASKED, {"role": "assistant", "tool_calls": [call()]}, RESULT, TOLD),
    "content null beside tool calls": messages(ASKED, {**CALLS, "content": None}, RESULT, TOLD),
    "a tool that says nothing": messages(ASKED, CALLS, says("tool", ""), TOLD),
    "ends with a tool call": messages(ASKED, CALLS, tools=[tool()]),
    "keys of its own": messages(ASKED, assistant("Here.", reasoning_content="easy", name="desk")),
    "weight one": messages(ASKED, assistant("Here.", weight=1)),
    "nulls": messages({**ASKED, "tool_calls": None, "name": None}, TOLD, tools=None),
    "tools as JSON": messages(ASKED, TOLD, tools=json.dumps([tool()])),
    "no tools": messages(ASKED, TOLD, tools=[]),
    "prompt and completion": completion([ASKED, TOLD, ASKED], [CALLS, RESULT, TOLD]),
    "a prompt that ends with a tool's message": completion([ASKED, CALLS, RESULT], [TOLD]),
}
GOOD_PAIRS = {
    "pair": pair([ASKED], [TOLD], [CALLS, RESULT, TOLD]),
    "implicit prompt": implicit([ASKED, TOLD], [ASKED, assistant("No.")]),
    "implicit prompt of several turns": implicit([ASKED, TOLD, ASKED, TOLD], [ASKED, TOLD, ASKED, CALLS]),
    "one answer goes on": implicit([ASKED, TOLD], [ASKED, assistant("No."), user("What?"), assistant("No.")]),
    "equal answers": pair([ASKED], [TOLD], [TOLD]),
    "equal conversations": implicit([ASKED, TOLD], [ASKED, TOLD]),
}
BAD: dict[str, tuple[Json, str]] = {
    "no messages": (messages(), "messages: is empty"),
    "no list": ({"messages": "hello"}, "messages: should be a list, not a string"),
    "no object": (messages(ASKED, "hello"), "messages.1: should be an object, not a string"),
    "no role": (messages(ASKED, {"content": "x"}), "messages.1.role: is missing"),
    "unknown role": (
        messages(ASKED, says("bot", "x")),
        "messages.1.role: should be 'system', 'user', 'assistant' or 'tool', not 'bot'",
    ),
    "no content": (messages({"role": "user"}, TOLD), "messages.0.content: is missing"),
    "content null": (messages(ASKED, says("assistant", None)), "messages.1.content: is missing"),  # type: ignore[arg-type]
    "empty content": (messages(ASKED, assistant("")), "messages.1.content: is empty"),
    "blank content": (messages(user(" \n"), TOLD), "messages.0.content: is empty"),
    "content of parts": (
        messages({"role": "user", "content": [{"type": "text", "text": "x"}]}, TOLD),
        "messages.0.content: should be a string, not a list",
    ),
    "a tool without content": (messages(ASKED, CALLS, {"role": "tool"}, TOLD), "messages.2.content: is missing"),
    "ends with the user": (
        messages(ASKED, TOLD, ASKED),
        "messages.2.role: the last message should be the assistant's, not the user's",
    ),
    "ends with a tool": (
        messages(ASKED, CALLS, RESULT),
        "messages.2.role: the last message should be the assistant's, not the tool's",
    ),
    "the user alone": (messages(ASKED), "messages.0.role: the last message should be the assistant's, not the user's"),
    "two system messages": (messages(system("a"), system("b"), ASKED, TOLD), "messages.1.role: is a second system"),
    "a late system message": (messages(ASKED, system("a"), TOLD), "messages.1.role: a system message stands first"),
    "the assistant first": (messages(TOLD), "messages.0.role: the assistant has nothing to answer"),
    "a tool first": (messages(RESULT, TOLD), "messages.0.role: a tool answers the assistant"),
    "a tool after the user": (messages(ASKED, RESULT, TOLD), "messages.1.role: a tool answers the assistant"),
    "the user calls": (messages(user("x") | {"tool_calls": [call()]}, TOLD), "messages.0.tool_calls: only the assist"),
    "a call of nothing": (calling(arguments={}), "messages.1.tool_calls.0.function.name: is missing"),
    "a call without a name": (calling(name=""), "messages.1.tool_calls.0.function.name: is empty"),
    "arguments that are no object": (
        calling(name="f", arguments=[1]),
        "messages.1.tool_calls.0.function.arguments: should be an object, not a list",
    ),
    "arguments that are no JSON": (
        calling(name="f", arguments="{city}"),
        "messages.1.tool_calls.0.function.arguments: should be an object, or one written as JSON",
    ),
    "arguments that are no number": (
        calling(name="f", arguments='{"x": NaN}'),
        "messages.1.tool_calls.0.function.arguments: should be an object, or one written as JSON",
    ),
    "empty tool calls": (messages(ASKED, assistant("", tool_calls=[])), "messages.1.content: is empty"),
    "a weight of its own": (messages(ASKED, assistant("x", weight=0)), "messages.1.weight: is not supported"),
    "half a character": (messages(user("\ud800"), TOLD), "messages.0.content: has half a surrogate pair"),
    "half a character in a key": (messages(ASKED, assistant("x", thinking="\udc00")), "messages.1: has half a"),
    "half a character in arguments": (
        calling(name="f", arguments={"a": ["\ud800"]}),
        "messages.1.tool_calls.0.function.arguments: has half a surrogate pair",
    ),
    "tools without a list": (messages(ASKED, TOLD, tools=3), "tools: should be a list, not a number"),
    "tools that are no JSON": (messages(ASKED, TOLD, tools="f"), "tools: should be a list of JSON schemas"),
    "a tool without a name": (messages(ASKED, TOLD, tools=[{"type": "function"}]), "tools: the tool at 0 has no name"),
    "a tool that is no object": (messages(ASKED, TOLD, tools=["f"]), "tools.0: should be an object, not a string"),
    "an empty prompt": (completion([], [TOLD]), "prompt: is empty"),
    "an empty completion": (completion([ASKED], []), "completion: is empty"),
    "a prompt of the assistant": (
        completion([ASKED, TOLD], [TOLD]),
        "prompt.1.role: a prompt cannot end with the assistant's message",
    ),
    "a completion of the user": (
        completion([ASKED], [user("x"), TOLD]),
        "completion.0.role: an answer begins with the assistant's message, not the user's",
    ),
    "a completion with a system message": (
        completion([ASKED], [TOLD, system("x"), TOLD]),
        "completion.1.role: a system message stands first",
    ),
}
BAD_PAIRS: dict[str, tuple[Json, str]] = {
    "an empty answer": (pair([ASKED], [TOLD], []), "rejected: is empty"),
    "an answer of the user": (pair([ASKED], [TOLD], [ASKED]), "rejected.0.role: an answer begins with the assistant's"),
    "a prompt that is a string beside one answer that is none": (
        pair("x", [TOLD], "No."),
        "chosen: should be a string, not a list",
    ),
    "nothing shared": (implicit([ASKED, TOLD], [user("x"), TOLD]), "chosen.0: is not the first message of rejected"),
    "questions that differ": (
        implicit([ASKED, TOLD, user("a"), TOLD], [ASKED, TOLD, user("b"), TOLD]),
        "chosen.2.role: here the two part, so it should be the assistant's, not the user's",
    ),
    "one that ends where the other goes on": (
        implicit([ASKED, TOLD], [ASKED, TOLD, user("a"), TOLD]),
        "rejected.2: goes on where the other ends",
    ),
    "a conversation that ends with the user": (
        implicit([ASKED, TOLD], [ASKED]),
        "rejected.0.role: the last message should be the assistant's, not the user's",
    ),
}


def refusal(path: Path, kind: RowKind) -> UserError:
    with pytest.raises(UserError) as caught:
        read_files([path], kind, NO_CACHE)
    return caught.value


@pytest.mark.parametrize(
    ("kind", "row"),
    [*((COMPLETION, row) for row in GOOD.values()), *((PREFERENCE, row) for row in GOOD_PAIRS.values())],
    ids=[*GOOD, *GOOD_PAIRS],
)
def test_a_conversation_that_templates_can_take_is_accepted(kind: RowKind, row: Json) -> None:
    columns = kind.recognise(row).row.model_validate(row).columns()
    said = [each for name, value in columns.items() if name != "tools" for each in value]
    assert all(isinstance(each["content"], str) for each in said)
    assert not any(value is None for each in said for value in each.values())


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        *((COMPLETION, row, reason) for row, reason in BAD.values()),
        *((PREFERENCE, row, reason) for row, reason in BAD_PAIRS.values()),
    ],
    ids=[*BAD, *BAD_PAIRS],
)
def test_what_is_wrong_is_told_with_file_line_and_place(
    kind: RowKind, row: Json, reason: str, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [json.dumps(row)])
    (problem,) = refusal(path, kind).problems
    assert problem.where == f"{path}:1"
    assert reason in problem.what


def test_all_that_is_wrong_with_messages_is_told_at_once(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    row = messages(user(""), says("bot", "x"), {"role": "assistant"}, 3, tools=[{}])
    (problem,) = refusal(write_jsonl(tmp_path / "rows.jsonl", [row]), COMPLETION).problems
    assert [part.partition(": ")[0] for part in problem.what.split("; ")] == [
        "messages.0.content", "messages.1.role", "messages.2.content", "messages.3", "tools",
    ]  # fmt: skip


# What becomes of a row.


def test_arguments_and_tools_written_as_json_are_what_they_are_as_objects() -> None:
    plain = messages(ASKED, assistant("", tool_calls=[call(city="Oslo", days=[1, None])]), tools=[tool()])
    written = json.loads(json.dumps(plain))
    function = written["messages"][1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    written["tools"] = json.dumps(written["tools"])
    assert MessagesRow.model_validate(written).columns() == MessagesRow.model_validate(plain).columns()
    assert MessagesRow.model_validate(plain).columns()["messages"] == plain["messages"]


def test_a_call_without_its_wrapping_is_wrapped() -> None:
    flat = messages(ASKED, assistant("", tool_calls=[{"name": "weather", "arguments": {"city": "Oslo"}}]))
    assert MessagesRow.model_validate(flat).columns()["messages"][1]["tool_calls"] == [call(city="Oslo")]


def test_what_is_null_is_as_if_it_were_not_there() -> None:
    """Data sets give every row every key, null where it has none."""
    nulls = {"tool_calls": None, "name": None, "tool_call_id": None}
    row = messages({**ASKED, **nulls}, {**TOLD, **nulls}, tools=None)
    assert MessagesRow.model_validate(row).columns() == messages(ASKED, TOLD)


def test_an_implicit_prompt_is_taken_out_as_trl_does_it() -> None:
    from trl import extract_prompt

    for row in GOOD_PAIRS.values():
        if "prompt" not in row and row["chosen"] != row["rejected"]:
            assert ImplicitPreferenceRow.model_validate(row).columns() == extract_prompt(row)
