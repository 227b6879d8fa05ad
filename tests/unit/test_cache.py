"""Entries are whole or not there, found by what they were made of, and never larger together than they may be."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lora_exp.config import CONF_DIR, DataConfig
from lora_exp.data import cache as room
from lora_exp.data.cache import FACTS, Cache, key_of
from lora_exp.data.kinds import COMPLETION, PREFERENCE, RowKind
from lora_exp.data.load import load_splits
from lora_exp.data.rows import digest_of
from lora_exp.data.split import Split
from lora_exp.data.tokenize import _KEPT, Limits, SplitReport, TokenizedData, tokenize_split, tokenize_splits
from lora_exp.models.embedded import build_tokenizer
from lora_exp.reports.console import data_lines


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10_000)


def keep(cache: Cache, key: str, size: int = 100) -> None:
    with cache.draft() as folder:
        (folder / "content").write_bytes(key.encode() * size)
        cache.keep(folder, key, {"size": size})


def content(cache: Cache, key: str) -> bytes | None:
    entry = cache.find(key)
    return None if entry is None else (entry.folder / "content").read_bytes()


def test_what_is_kept_is_found_with_its_facts(cache: Cache) -> None:
    keep(cache, "a")
    entry = cache.find("a")
    assert entry is not None
    assert (content(cache, "a"), entry.facts) == (b"a" * 100, {"size": 100})
    assert cache.find("b") is None
    assert [each.name for each in cache.folder.iterdir()] == ["a"], "no draft is left"


def test_a_draft_that_is_given_up_leaves_nothing(cache: Cache) -> None:
    with suppress(RuntimeError), cache.draft() as folder:
        (folder / "content").write_bytes(b"half")
        raise RuntimeError
    assert list(cache.folder.iterdir()) == []


def test_the_draft_of_a_killed_process_is_no_entry_and_goes_in_time(cache: Cache) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from lora_exp.data.cache import Cache\n"
        "with Cache(Path(sys.argv[1]), 1000).draft() as folder:\n"
        "    (folder / 'content').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(cache.folder)], check=False)
    (draft,) = cache.folder.iterdir()
    keep(cache, "a")
    assert draft.exists(), "it may be at work still"
    long_ago = time.time() - 2 * room.DRAFT_SECONDS
    os.utime(draft, (long_ago, long_ago))
    keep(cache, "b")
    assert {each.name for each in cache.folder.iterdir()} == {"a", "b"}


@given(data=st.data())
def test_damage_anywhere_is_recognised_and_the_entry_removed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cache = Cache(tmp_path_factory.mktemp("cache"), 10_000)
    keep(cache, "a")
    path = cache.folder / "a" / data.draw(st.sampled_from(["content", FACTS]))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from([whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], whole + b"x"])
    )
    path.write_bytes(damaged)
    found = cache.find("a")
    if found is None:
        assert list(cache.folder.iterdir()) == []
    else:  # of the facts, only those that nobody can check
        assert path.name == FACTS
        assert json.loads(damaged)["files"] == json.loads(whole)["files"]
    keep(cache, "a")
    assert content(cache, "a") == b"a" * 100


def test_those_not_used_for_longest_go(cache: Cache) -> None:
    for number, name in enumerate("abcd"):
        keep(cache, name, 2_000)
        os.utime(cache.folder / name / FACTS, (number, number))
    assert content(cache, "a")
    keep(cache, "e", 4_000)
    assert {each.name for each in cache.folder.iterdir()} == {"a", "d", "e"}


def test_what_is_too_large_by_itself_is_not_kept(cache: Cache) -> None:
    keep(cache, "small")
    keep(cache, "large", 20_000)
    assert {each.name for each in cache.folder.iterdir()} == {"small"}


def test_a_cache_of_no_size_keeps_and_finds_nothing(cache: Cache) -> None:
    keep(cache, "a")
    off = Cache(cache.folder, 0)
    assert off.find("a") is None
    keep(off, "b")
    assert {each.name for each in cache.folder.iterdir()} == {"a"}


def test_who_comes_second_leaves_the_first_ones_entry(cache: Cache) -> None:
    with cache.draft() as folder:
        (folder / "content").write_bytes(b"second")
        keep(cache, "a")
        cache.keep(folder, "a", {})
    assert content(cache, "a") == b"a" * 100
    assert not cache.failures


def test_a_file_that_cannot_be_written_costs_a_note(cache: Cache) -> None:
    """Here because files may have no more than 10 bytes; a full disk is told the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with cache.draft() as folder:
        (folder / "content").write_bytes(b"x")
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            cache.keep(folder, "a", {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert cache.find("a") is None
    assert list(cache.folder.iterdir()) == []
    (failure,) = cache.failures
    assert failure.startswith("rows and token ids are not kept for the next run")
    assert failure.endswith("File too large")


def test_a_key_names_all_its_parts_and_the_code() -> None:
    keys = {key_of("x", a=1), key_of("x", a=2), key_of("x", b=1), key_of("y", a=1), key_of("x", a=[1]), key_of("x")}
    assert len(keys) == 6
    assert key_of("x", a=1, b=2) == key_of("x", b=2, a=1)


# Token ids.


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "model" / "tiny.yaml"))
    assert isinstance(container, dict)
    return dict(container["embedded"]["tokenizer"])


LIMITS = Limits(200, 60, "left")


def tokens(
    cache: Cache, splits: dict[str, Split], kind: RowKind, tokenizer: Any, limits: Limits = LIMITS, template: Any = True
) -> TokenizedData:
    """Tokenise as another process would: this one's own memory is emptied."""
    _KEPT.clear()
    return tokenize_splits(splits, kind.answers, tokenizer, dict.fromkeys(splits, limits), template, cache)


@pytest.mark.parametrize("kind", [COMPLETION, PREFERENCE], ids=["completion", "preference"])
def test_kept_token_ids_are_bitwise_what_tokenising_gives(tmp_path: Path, spec: dict[str, Any], kind: RowKind) -> None:
    cache, tokenizer = Cache(tmp_path, 10**9), build_tokenizer(spec)
    splits = load_splits(DataConfig(splits_dir="pkg://lora_exp.data.sample"), kind)
    dropped = {"prompt": "p" * 70, "completion": "", "chosen": "same", "rejected": "same"}
    splits = {name: replace(split, rows=[*split.rows, dropped]) for name, split in splits.items()}
    first, second = tokens(cache, splits, kind, tokenizer), tokens(cache, splits, kind, tokenizer)
    assert (first.kept, second.kept) == (frozenset(), frozenset(splits))
    for name, split in splits.items():
        dataset, report = tokenize_split(split.rows, kind.answers, tokenizer, LIMITS, True, split.source, split.format)
        for found in (first, second):
            assert found.datasets[name].features == dataset.features
            assert found.datasets[name].data.table.combine_chunks().equals(dataset.data.table.combine_chunks())
            assert found.datasets[name].to_list() == dataset.to_list()
            assert found.reports[name] == report
    assert all(report.dropped for report in second.reports.values()) or kind is COMPLETION
    assert all(report.cut_answers and report.cut_prompts for report in second.reports.values())
    assert second.longest_row == first.longest_row


def test_anything_that_decides_about_ids_makes_them_anew(tmp_path: Path, spec: dict[str, Any]) -> None:
    cache, tokenizer = Cache(tmp_path, 10**9), build_tokenizer(spec)
    splits = {"train": Split([{"prompt": f"p{n}", "completion": "c"} for n in range(4)], "here")}
    assert not tokens(cache, splits, COMPLETION, tokenizer).kept
    assert tokens(cache, splits, COMPLETION, tokenizer).kept
    assert tokens(cache, {"val": Split(splits["train"].rows, "there")}, COMPLETION, tokenizer).kept == {"val"}
    other_rows = {"train": Split([*splits["train"].rows[:3], {"prompt": "p3", "completion": "d"}], "here")}
    assert not tokens(cache, other_rows, COMPLETION, tokenizer).kept
    for limits in (
        Limits(199, 60, "left"),
        Limits(200, 61, "left"),
        Limits(200, 60, "right"),
        Limits(200, None, "left"),
    ):
        assert not tokens(cache, splits, COMPLETION, tokenizer, limits).kept
    assert not tokens(cache, splits, COMPLETION, tokenizer, template=False).kept
    other_template = build_tokenizer({**spec, "chat_template": "{{ '' }}" + spec["chat_template"]})
    assert not tokens(cache, splits, COMPLETION, other_template).kept
    assert tokens(cache, splits, COMPLETION, build_tokenizer(spec)).kept


def test_a_template_that_writes_the_day_is_good_for_a_day(
    tmp_path: Path, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import date

    from lora_exp.data import token_cache

    cache = Cache(tmp_path, 10**9)
    tokenizer = build_tokenizer({**spec, "chat_template": "{{ strftime_now('%d') }}" + spec["chat_template"]})
    splits = {"train": Split([{"prompt": "p", "completion": "c"}], "here")}
    tokens(cache, splits, COMPLETION, tokenizer)
    assert tokens(cache, splits, COMPLETION, tokenizer).kept

    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date.fromordinal(date.today().toordinal() + 1)

    monkeypatch.setattr(token_cache, "date", Tomorrow)
    assert not tokens(cache, splits, COMPLETION, tokenizer).kept


def test_rows_are_named_by_their_content_wherever_they_are(
    tmp_path: Path, write_jsonl: Callable[..., Path], preference: Callable[..., dict[str, Any]]
) -> None:
    rows = [preference(prompt=f"größer {n}") for n in range(5)]
    file = load_splits(DataConfig(train_file=str(write_jsonl(tmp_path / "a.jsonl", rows))), PREFERENCE)["train"]
    assert digest_of(file.rows) == digest_of(rows) != digest_of(rows[:4])


SCRIPT = """
import sys
from pathlib import Path
from lora_exp.config import DataConfig
from lora_exp.data.cache import data_cache
from lora_exp.data.kinds import PREFERENCE
from lora_exp.data.load import load_splits
from lora_exp.data.tokenize import Limits, tokenize_splits
from lora_exp.models.embedded import build_tokenizer
from omegaconf import OmegaConf
from lora_exp.config import CONF_DIR
spec = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "model" / "tiny.yaml"))["embedded"]["tokenizer"]
config = DataConfig(splits_dir="pkg://lora_exp.data.sample")
limits = dict.fromkeys(("train", "val"), Limits(200, 60, "left"))
splits = load_splits(config, PREFERENCE)
data = tokenize_splits(
    splits, PREFERENCE.answers, build_tokenizer(spec), limits, "auto", data_cache(config.cache_size)
)
reports = {name: (report.as_dict(), report.lengths.as_dict()) for name, report in data.reports.items()}
print(sorted(data.kept), data.datasets["train"].to_list(), reports)
"""


def test_another_process_starts_from_the_first_ones_ids(tmp_path: Path) -> None:
    environment = {**os.environ, "LORA_EXP_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-c", SCRIPT]
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert first.startswith("[] ")
    assert second == first.replace("[]", "['train', 'val']", 1)


def test_the_line_of_a_split_says_that_its_ids_were_kept(capsys: pytest.CaptureFixture[str]) -> None:
    report = SplitReport("here", rows=2, kept=2).as_dict()
    data_lines({"train": report, "val": report}, {"val"})
    train, val = capsys.readouterr().out.splitlines()
    assert train.endswith("2 rows")
    assert val.endswith("2 rows · from the cache")
