"""What is no mistake and still told: rows that stand twice, rows of both splits, and what a row looks like."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.config import DataConfig
from lora_exp.data.duplicates import Finding
from lora_exp.data.jsonl import SHOWN
from lora_exp.data.kinds import COMPLETION, PREFERENCE, RowKind
from lora_exp.data.load import load_splits
from lora_exp.data.sightings import EMAIL, PHONE, normalised
from lora_exp.errors import UserError

Make = Callable[..., dict[str, Any]]
Write = Callable[..., Path]


@pytest.fixture
def findings(tmp_path: Path, write_jsonl: Write) -> Callable[..., dict[str, Finding]]:
    """Return a function that writes rows and gives what is found in them, in `val` where there is one."""

    def find(train: list[Any], val: list[Any] | None = None, kind: RowKind = PREFERENCE, **keys: Any) -> Any:
        files = {"train_file": str(write_jsonl(tmp_path / "train.jsonl", train))}
        if val is not None:
            files["val_file"] = str(write_jsonl(tmp_path / "val.jsonl", val))
        splits = load_splits(DataConfig(**files, **keys), kind)
        return {each.name: each for each in splits["train" if val is None else "val"].findings}

    return find


def test_good_rows_have_nothing_to_tell(findings: Any, preference: Make) -> None:
    rows = [preference(prompt=f"{n}?") for n in range(9)]
    assert findings(rows[:5]) == findings(rows[:5], rows[5:]) == {}


# Twice in one split.


def test_rows_that_stand_twice_are_counted(findings: Any, preference: Make, tmp_path: Path) -> None:
    rows = [preference(prompt="a"), "", preference(prompt="b"), preference(prompt="a"), preference(prompt="a ")]
    found = findings([*rows, rows[0]])["repeated_rows"]
    assert (found.number, found.first) == (2, f"{tmp_path}/train.jsonl:4")
    assert str(found).startswith(f"2 rows repeat earlier ones (first: {found.first})")


def test_keys_that_are_left_out_make_no_other_row(findings: Any, preference: Make) -> None:
    assert findings([preference(score=1), preference(score=2)])["repeated_rows"].number == 1


# In both splits.


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, "leak_exact"),
        ({"score": 3}, "leak_exact"),
        ({"prompt": "  WHERE is my   parcel"}, "leak_near"),
        ({"chosen": "On - its - way!", "rejected": "no idea"}, "leak_near"),
        ({"chosen": "Lost."}, "leak_prompt"),
        ({"prompt": "Where is my parcel now?"}, None),
        ({"chosen": "No idea.", "rejected": "On its way."}, "leak_prompt"),
    ],
    ids=str,
)
def test_a_row_of_both_splits_is_told_by_how_much_it_is_the_same(
    findings: Any, preference: Make, tmp_path: Path, changes: dict[str, Any], how: str | None
) -> None:
    train = [preference(prompt="Another?"), preference(), preference()]
    found = findings(train, [preference(prompt="New?"), "", preference(**changes)])
    assert list(found) == ([how] if how else [])
    if how:
        places = f"{tmp_path}/val.jsonl:3 and {tmp_path}/train.jsonl:2"
        assert (found[how].number, found[how].first) == (1, places)


def test_messages_and_strings_that_say_the_same_are_near(findings: Any) -> None:
    told = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On its way."}]
    strings = {"prompt": "Where is it?", "completion": "on its way"}
    assert set(findings([{"messages": told}], [strings], COMPLETION)) == {"leak_near"}
    other = [*told[:1], {"role": "assistant", "content": "Lost."}]
    assert set(findings([{"messages": other}], [strings], COMPLETION)) == {"leak_prompt"}


def test_a_leak_is_an_error_where_that_is_asked_for(findings: Any, preference: Make, tmp_path: Path) -> None:
    train = [preference(prompt=f"{n} a?") for n in range(SHOWN + 10)]
    val = [*train[: SHOWN + 2], preference(prompt="3 A"), preference(prompt="4 a?", chosen="else")]
    with pytest.raises(UserError) as caught:
        findings(train, val, on_leak="error")
    error = caught.value
    assert error.title == f"{SHOWN + 3} rows of val cannot be evaluated on: they are trained on"
    assert [problem.where for problem in error.problems[:2]] == [f"{tmp_path}/val.jsonl:{n}" for n in (1, 2)]
    assert error.problems[1].what == f"is the same row as {tmp_path}/train.jsonl:2"
    assert (error.problems[-1].what, len(error.problems)) == ("and 3 more rows of train", SHOWN + 1)
    assert "data.on_leak=warn" in error.problems[-1].mend
    assert "data.on_leak=warn" in str(error)


def test_another_answer_to_the_same_prompt_is_no_error(findings: Any, preference: Make) -> None:
    assert set(findings([preference()], [preference(chosen="x")], on_leak="error")) == {"leak_prompt"}


def test_a_leak_can_be_ignored(findings: Any, preference: Make) -> None:
    assert findings([preference()], [preference()], on_leak="ignore") == {}


def test_rows_of_load_dataset_are_looked_at_too(
    tmp_path: Path, write_jsonl: Write, preference: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = str(write_jsonl(tmp_path / "rows.jsonl", [preference(), preference()]))
    config = DataConfig(path="json", data_files={"train": file, "test": file}, val_split="test")
    splits = load_splits(config, PREFERENCE)
    assert [each.name for each in splits["train"].findings] == ["repeated_rows"]
    assert [each.name for each in splits["val"].findings] == ["repeated_rows", "leak_exact"]
    with pytest.raises(UserError, match="trained on"):
        load_splits(config.model_copy(update={"on_leak": "error"}), PREFERENCE)


# What near means.

punctuated = st.text("aB1 .,;:!?-_\t\n'\"()[]", max_size=30)


@given(text=punctuated)
def test_an_ascii_text_is_its_letters_and_digits_in_lower_case(text: str) -> None:
    assert normalised(text) == (re.sub(r"[\W_]+", "", text.lower()) or text).encode()


@given(text=st.text(st.characters(exclude_categories=("Cs",))), before=st.sampled_from([" ", "\u00a0", "…", "“", "。"]))
def test_case_spaces_and_punctuation_make_no_difference(text: str, before: str) -> None:
    words = f"x {text}"
    assert normalised(f"{before}{words}{before}") == normalised(words)
    assert normalised(unicodedata.normalize("NFD", words)) == normalised(unicodedata.normalize("NFC", words))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Straße", "STRASSE"),
        ("ﬁne", "fine"),
        ("\uff21\uff22", "ab"),
        ("«Où ?»", "où"),
        ("你好\uff0c世界。", "你好 世界"),
    ],
)
def test_texts_that_are_near(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(("one", "other"), [("?!", "..."), ("🙂", "🙁"), ("किताब", "कुतूब"), ("1.5", "2.5")])
def test_texts_that_are_not_near(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


# What a row looks like.


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("equal_answers", {"chosen": "No idea."}),
        ("another_kind", {"completion": "On its way."}),
        ("emails", {"rejected": "Write to me.too@mail.example-shop.co.uk."}),
        ("phones", {"prompt": "Call +49 (0)30 123456 now"}),
    ],
)
def test_a_look_is_counted_with_its_first_row(
    findings: Any, preference: Make, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    rows = [preference(**{"prompt": f"{n}?", **(changes if n in (2, 4) else {})}) for n in range(6)]
    found = findings(rows)
    found.pop("repeated_rows", None)
    assert list(found) == [name]
    assert (found[name].number, found[name].first) == (2, f"{tmp_path}/train.jsonl:3")
    assert not re.search(r"me\.too|123456", str(found[name])), "what is private is not repeated"


def test_a_row_with_the_answers_of_another_recipe_is_told(findings: Any, record: Make) -> None:
    assert set(findings([{**record(), "chosen": "a", "rejected": "b"}], kind=COMPLETION)) == {"another_kind"}


def test_how_a_file_is_written_is_told_once(tmp_path: Path, preference: Make) -> None:
    import json

    path = tmp_path / "rows.jsonl"
    text = "\ufeff" + json.dumps(preference()) + "\n" + "".join(json.dumps(preference(prompt=p)) + "\r\n" for p in "ab")
    path.write_bytes(text.encode())
    found = {each.name: each for each in load_splits(DataConfig(train_file=str(path)), PREFERENCE)["train"].findings}
    assert {name: each.first for name, each in found.items()} == {
        "byte_order_mark": f"{path}:1",
        "crlf": f"{path}:2",
    }
    assert found["crlf"].number == 2


@pytest.mark.parametrize("text", ["a@b.de", "write to x.y+z@sub.host-1.org!", "<A@B.COM>", "ü@möbel.de a@b.io"])
def test_addresses(text: str) -> None:
    assert EMAIL.search(text)


@pytest.mark.parametrize("text", ["@name", "a@b", "x@example.com", "x@test", "a @ b.de", "me@shop.example", "1@2.3"])
def test_no_addresses(text: str) -> None:
    assert not EMAIL.search(text)


@pytest.mark.parametrize(
    "text", ["+49 30 1234567", "+14155550123", "(415) 555-0123", "415-555-0123", "415.555.0123", "+44 (0) 20 7946 0958"]
)
def test_phone_numbers(text: str) -> None:
    assert PHONE.search(f"Call {text}, please.")


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-05 08:11:00",
        "1234567890",
        "+1500",
        "v1.2.3.4.5.6",
        "192.168.100.200",
        "1234-5678-9012-3456",
        "3.14159265",
    ],
)
def test_no_phone_numbers(text: str) -> None:
    assert not PHONE.search(f"See {text}, please.")


@pytest.mark.parametrize(
    "text", ["a" * 10**5 + "@", "@a." * 10**5, "a@" + "b-" * 10**5, "+1 (1 " * 10**5, "1" * 10**5, "415-555-" * 10**5]
)
def test_no_text_takes_long_to_look_at(text: str) -> None:
    import time

    start = time.process_time()
    EMAIL.search(text)
    PHONE.search(text)
    assert time.process_time() - start < 5
