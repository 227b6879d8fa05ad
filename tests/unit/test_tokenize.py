"""Rows become token ids within their limits, and every row and token is accounted for."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_exp.config import CONF_DIR, DataConfig
from lora_exp.data.encode import BATCH
from lora_exp.data.kinds import COMPLETION, PREFERENCE, RowKind
from lora_exp.data.load import load_splits
from lora_exp.data.split import Split
from lora_exp.data.tokenize import Limits, SplitReport, tokenize_split, use_chat_template
from lora_exp.models.embedded import build_tokenizer

ENOUGH = Limits(1_000_000, None, "left")
KINDS = {"completion": COMPLETION, "preference": PREFERENCE}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=25)
rows_of_texts = st.lists(
    st.fixed_dictionaries({"prompt": texts, "completion": texts, "chosen": texts, "rejected": texts}),
    min_size=1,
    max_size=5,
)


@st.composite
def some_limits(draw: st.DrawFn) -> Limits:
    max_length = draw(st.integers(2, 120))
    max_prompt_length = draw(st.none() | st.integers(1, max_length - 1))
    return Limits(max_length, max_prompt_length, draw(st.sampled_from(["left", "right"])))


@pytest.fixture(scope="session")
def spec() -> dict[str, Any]:
    """Return the tokenizer of conf/model/tiny.yaml."""
    container = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "model" / "tiny.yaml"))
    assert isinstance(container, dict)
    return dict(container["embedded"]["tokenizer"])


@pytest.fixture(scope="session")
def tokenizer(spec: dict[str, Any]) -> Any:
    return build_tokenizer(spec)


@pytest.fixture(scope="session")
def without_end(spec: dict[str, Any]) -> Any:
    """Make a tokenizer that knows no end token and no template."""
    return build_tokenizer({"special_tokens": {"pad_token": "<|pad|>"}, "chat_template": None})


@dataclass(frozen=True)
class Tokenized:
    """The rows that were kept, by their index, and the report."""

    rows: dict[int, dict[str, list[int]]]
    report: SplitReport


def tokenize(
    rows: list[dict[str, str]], kind: RowKind, tokenizer: Any, limits: Limits = ENOUGH, template: bool = True
) -> Tokenized:
    dataset, report = tokenize_split(rows, kind.answers, tokenizer, limits, template, "a source")
    assert dataset.column_names == ["row", "prompt_ids", *(f"{answer}_ids" for answer in kind.answers)]
    assert dataset["row"][:] == sorted(set(dataset["row"])), "rows keep their order"
    names = {"prompt": "prompt_ids", **{answer: f"{answer}_ids" for answer in kind.answers}}
    return Tokenized({each["row"]: {name: each[column] for name, column in names.items()} for each in dataset}, report)


def row(prompt: str, chosen: str, rejected: str = "no") -> dict[str, str]:
    return {"prompt": prompt, "completion": chosen, "chosen": chosen, "rejected": rejected}


# Limits.


@kinds
@given(rows=rows_of_texts, limits=some_limits(), template=st.booleans())
def test_no_row_is_longer_than_its_limits_and_no_answer_is_empty(
    tokenizer: Any, kind: RowKind, rows: list[dict[str, str]], limits: Limits, template: bool
) -> None:
    done = tokenize(rows, kind, tokenizer, limits, template)
    for ids in done.rows.values():
        prompt_limit = limits.max_length if limits.max_prompt_length is None else limits.max_prompt_length
        assert len(ids["prompt"]) <= prompt_limit
        for answer in kind.answers:
            assert ids[answer]
            assert len(ids["prompt"]) + len(ids[answer]) <= limits.max_length
        if len(kind.answers) > 1:
            assert ids["chosen"] != ids["rejected"]


@kinds
@given(rows=rows_of_texts, limits=some_limits(), template=st.booleans())
def test_a_cut_prompt_keeps_the_end_or_the_start_that_was_asked_for_and_an_answer_its_start(
    tokenizer: Any, kind: RowKind, rows: list[dict[str, str]], limits: Limits, template: bool
) -> None:
    short = tokenize(rows, kind, tokenizer, limits, template).rows
    # One row at a time: uncut, a row whose answers are equal has no ids to compare with.
    whole = tokenize(rows, kind, tokenizer, ENOUGH, template).rows
    assert set(short) <= set(whole)
    for index, ids in short.items():
        prompt, kept = whole[index]["prompt"], ids["prompt"]
        assert kept == (prompt[len(prompt) - len(kept) :] if limits.truncation_side == "left" else prompt[: len(kept)])
        limit = limits.max_length if limits.max_prompt_length is None else limits.max_prompt_length
        assert len(kept) == min(len(prompt), limit), "no more is cut than has to be"
        for answer in kind.answers:
            room = limits.max_length - len(kept)
            assert ids[answer] == whole[index][answer][:room]


@kinds
@given(rows=rows_of_texts, limits=some_limits(), template=st.booleans())
def test_every_row_and_every_cut_token_is_accounted_for(
    tokenizer: Any, kind: RowKind, rows: list[dict[str, str]], limits: Limits, template: bool
) -> None:
    done = tokenize(rows, kind, tokenizer, limits, template)
    report = done.report
    assert report.rows == len(rows)
    assert report.kept == len(done.rows)
    assert report.rows == report.kept + sum(report.dropped.values())
    assert all(number > 0 for number in report.dropped.values())
    assert json.loads(json.dumps(report.as_dict()))["dropped"] == dict(report.dropped)

    whole = tokenize(rows, kind, tokenizer, ENOUGH, template).rows
    lost = {name: [] for name in ("prompt", *kind.answers)}
    for index, ids in done.rows.items():
        for name, part in ids.items():
            lost[name].append(len(whole[index][name]) - len(part))
    lost_answers = [number for name in kind.answers for number in lost[name]]
    assert report.cut_prompts == sum(number > 0 for number in lost["prompt"])
    assert report.cut_prompt_tokens == sum(lost["prompt"])
    assert report.cut_answers == sum(number > 0 for number in lost_answers)
    assert report.cut_answer_tokens == sum(lost_answers)
    assert report.prompt_lengths == [len(ids["prompt"]) for ids in done.rows.values()]
    answers = [len(ids[name]) for ids in done.rows.values() for name in kind.answers]
    assert sorted(report.answer_lengths) == sorted(answers)

    told = report.as_dict()
    assert told["answer_tokens"] == sum(answers)
    if answers:
        assert told["answer_lengths"] == {"min": min(answers), "median": median(answers), "max": max(answers)}
    else:
        assert told["answer_lengths"] is None
        assert told["prompt_lengths"] is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_may_fill_the_row_where_it_has_no_limit_and_then_its_answer_is_gone(tokenizer: Any, side: Any) -> None:
    done = tokenize([row("x" * 50, "yes"), row("x", "yes")], COMPLETION, tokenizer, Limits(40, None, side))
    assert set(done.rows) == {1}
    assert done.report.dropped == Counter({"answer cut away": 1})


# Rows with nothing to learn from.


def test_a_row_whose_answers_are_equal_is_dropped(tokenizer: Any) -> None:
    rows = [row("p", "same", "same"), row("p", "one", "two"), row("p", "same, but longer", "same, but no")]
    done = tokenize(rows, PREFERENCE, tokenizer)
    assert set(done.rows) == {1, 2}
    assert done.report.dropped == Counter({"with equal answers": 1})


def test_a_row_whose_answers_part_beyond_the_limit_is_dropped_for_that_reason(tokenizer: Any) -> None:
    uncut = tokenize([row("p", "same, but longer", "same, but no")], PREFERENCE, tokenizer).rows[0]
    limits = Limits(len(uncut["prompt"]) + len("same"), None, "left")
    done = tokenize([row("p", "same, but longer", "same, but no")], PREFERENCE, tokenizer, limits)
    assert not done.rows
    assert done.report.dropped == Counter({"answers equal after cutting": 1})


@kinds
def test_a_row_with_an_empty_answer_is_dropped(without_end: Any, kind: RowKind) -> None:
    rows = [row("p", ""), row("p", "yes")]
    done = tokenize(rows, kind, without_end, template=False)
    assert set(done.rows) == {1}
    assert done.report.dropped == Counter({"empty answer": 1})


@kinds
def test_no_rows_become_an_empty_dataset(tokenizer: Any, kind: RowKind) -> None:
    done = tokenize([], kind, tokenizer)
    assert (done.rows, done.report.rows, done.report.kept) == ({}, 0, 0)


@kinds
def test_more_rows_than_a_batch_are_all_there_and_in_order(tokenizer: Any, kind: RowKind) -> None:
    rows = [row(f"question {number}", f"answer {number}") for number in range(BATCH + 3)]
    done = tokenize(rows, kind, tokenizer)
    assert list(done.rows) == list(range(len(rows)))
    for index in (0, BATCH - 1, BATCH, BATCH + 2):
        assert done.rows[index] == tokenize([rows[index]], kind, tokenizer).rows[0]


# What the ids are.


@kinds
@given(rows=rows_of_texts)
def test_without_a_template_prompt_and_answer_are_joined_verbatim_with_the_end_token(
    tokenizer: Any, kind: RowKind, rows: list[dict[str, str]]
) -> None:
    end = [tokenizer.eos_token_id]
    for index, ids in tokenize(rows, kind, tokenizer, template=False).rows.items():
        for answer in kind.answers:
            text = rows[index]["prompt"] + rows[index][answer]
            assert ids["prompt"] + ids[answer] == tokenizer(text, add_special_tokens=False)["input_ids"] + end
            assert tokenizer.decode([*ids["prompt"], *ids[answer]], skip_special_tokens=True) == text


def test_an_answer_that_ends_with_the_end_token_gets_no_second_one(tokenizer: Any) -> None:
    plain, ended = row("p", "yes", "no"), row("p", f"yes{tokenizer.eos_token}", "no")
    first, second = (tokenize([each], PREFERENCE, tokenizer, template=False).rows for each in (plain, ended))
    assert first == second


@kinds
@given(rows=rows_of_texts)
def test_with_a_template_the_ids_are_those_of_the_whole_conversation(
    tokenizer: Any, kind: RowKind, rows: list[dict[str, str]]
) -> None:
    for index, ids in tokenize(rows, kind, tokenizer).rows.items():
        asked = [{"role": "user", "content": rows[index]["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids["prompt"] == prompt
        for answer in kind.answers:
            told = [*asked, {"role": "assistant", "content": rows[index][answer]}]
            assert ids["prompt"] + ids[answer] == tokenizer.apply_chat_template(told, return_dict=True)["input_ids"]


@given(rows=rows_of_texts)
def test_tokens_that_merge_across_the_boundary_are_split_where_prompt_and_answers_part(
    merging: Any, rows: list[dict[str, str]]
) -> None:
    for index, ids in tokenize(rows, PREFERENCE, merging, template=False).rows.items():
        alone = merging(rows[index]["prompt"])["input_ids"]
        assert ids["prompt"] == alone[: len(ids["prompt"])]
        for answer in PREFERENCE.answers:
            whole = merging(rows[index]["prompt"] + rows[index][answer] + merging.eos_token)["input_ids"]
            assert ids["prompt"] + ids[answer] == whole


def test_a_merge_across_the_boundary_belongs_to_the_answer(merging: Any) -> None:
    ids = tokenize([row("xa", "b", "c")], PREFERENCE, merging, template=False).rows[0]
    assert [merging.decode(ids[name]) for name in ("prompt", "chosen", "rejected")] == ["x", "ab</s>", "ac</s>"]


@pytest.fixture(scope="session")
def merging() -> Any:
    """Make a tokenizer whose "a" and "b" become one token where they meet."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {char: index for index, char in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


@given(text=texts)
def test_the_embedded_tokenizer_has_one_token_a_byte_and_gives_every_text_back(tokenizer: Any, text: str) -> None:
    assume(not any(token in text for token in tokenizer.all_special_tokens))
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("setting", "expected"), [("auto", (True, False)), (True, (True, True)), (False, (False,) * 2)]
)
def test_auto_uses_a_chat_template_where_there_is_one(
    tokenizer: Any, without_end: Any, setting: Any, expected: tuple[bool, bool]
) -> None:
    assert tuple(use_chat_template(setting, each) for each in (tokenizer, without_end)) == expected


# The sample rows.

Sample = dict[str, Split]


@pytest.fixture(params=KINDS.values(), ids=KINDS, scope="session")
def sample(request: pytest.FixtureRequest) -> tuple[RowKind, Sample]:
    return request.param, load_splits(DataConfig(splits_dir="pkg://lora_exp.data.sample"), request.param)


def test_the_sample_has_at_least_200_rows_to_train_on_and_some_to_evaluate_on(sample: tuple[RowKind, Sample]) -> None:
    _, splits = sample
    assert len(splits["train"].rows) >= 200
    assert len(splits["val"].rows) >= 20


def normalised(text: str) -> str:
    return " ".join(text.lower().split())


def test_the_samples_splits_share_no_text(sample: tuple[RowKind, Sample]) -> None:
    kind, splits = sample
    for column in ("prompt", *kind.answers):
        train, val = ({normalised(each[column]) for each in splits[name].rows} for name in ("train", "val"))
        assert not train & val


def test_no_text_of_the_sample_comes_twice(sample: tuple[RowKind, Sample]) -> None:
    kind, splits = sample
    for column in ("prompt", *kind.answers):
        found = Counter(each[column] for split in splits.values() for each in split.rows)
        assert found.most_common(1)[0][1] == 1


def test_no_five_words_open_more_than_two_texts_of_the_sample(sample: tuple[RowKind, Sample]) -> None:
    kind, splits = sample
    for column in ("prompt", *kind.answers):
        openings = Counter(
            " ".join(each[column].lower().split()[:5]) for split in splits.values() for each in split.rows
        )
        assert openings.most_common(1)[0][1] <= 2


def test_the_sample_fits_the_default_lengths_whole(sample: tuple[RowKind, Sample], tokenizer: Any) -> None:
    kind, splits = sample
    default = Limits(512, 256, "left")
    for split in splits.values():
        report = tokenize(split.rows, kind, tokenizer, default).report
        assert report.kept == report.rows
        assert report.cut_prompts == report.cut_answers == 0
