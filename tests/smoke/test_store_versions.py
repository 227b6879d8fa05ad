"""Stored reference log-probs belong to the libraries that computed them; what a run does not read it says and keeps."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lora_exp import provenance
from lora_exp.engine.identity import LIBRARIES
from lora_exp.engine.store import ReferenceStore, StoredModel
from lora_exp.reports import console
from lora_exp.store import main
from tests.engines import FEW
from tests.few import pairs, write_rows
from tests.runs import build_trainer

ROWS = 13
PLENTY = 10**9

# As lora_exp 0.1.0 made them before identities held versions. A store of this layout must stay readable, or VERSION
# of `engine/store_file.py` must say that it is another one.
EARLIER_TABLES = """
CREATE TABLE models (
    id INTEGER PRIMARY KEY, identity TEXT NOT NULL UNIQUE, description TEXT NOT NULL, used INTEGER NOT NULL,
    rows INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY, model INTEGER NOT NULL, key BLOB NOT NULL, size INTEGER NOT NULL, used INTEGER NOT NULL,
    UNIQUE (model, key)
);
CREATE INDEX entries_by_use ON entries (used);
CREATE TABLE contents (id INTEGER PRIMARY KEY, checksum BLOB NOT NULL, value BLOB NOT NULL);
CREATE TABLE files (
    path TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
    digest TEXT NOT NULL, remembered INTEGER NOT NULL
);
CREATE TRIGGER entry_added AFTER INSERT ON entries BEGIN
    UPDATE models SET rows = rows + 1, bytes = bytes + new.size WHERE id = new.model;
END;
CREATE TRIGGER entry_removed AFTER DELETE ON entries BEGIN
    DELETE FROM contents WHERE id = old.id;
    UPDATE models SET rows = rows - 1, bytes = bytes - old.size WHERE id = old.model;
END;
"""
EARLIER = "0123456789abcdef" * 2
DESCRIPTION = (
    '{"model": "lora_exp/tiny", "quant": "none", "dtype": "float32", "adapter": "none", "engine": "packed on cpu"}'
)


@dataclass
class Said:
    """What a run printed: lines by the name they stand beside, and notes."""

    lines: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@contextmanager
def listening() -> Iterator[Said]:
    said = Said()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "say", said.lines.__setitem__)
        patch.setattr(console, "note", said.notes.append)
        yield said


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "reference.sqlite3"


@pytest.fixture
def reference(tmp_path: Path, path: Path) -> Callable[[], Said]:
    """Return a function that prepares a DPO run on `path` and returns what it printed."""
    overrides = ["recipe=dpo", *FEW, "trainer=cpu", f"store.path={path}", *write_rows(tmp_path / "rows", pairs(ROWS))]

    def prepare() -> Said:
        with listening() as said:
            build_trainer(tmp_path / "run", overrides)
        return said

    return prepare


def line(computed: int, read: int, path: Path) -> str:
    return f"{computed} rows computed, {read} read from {path}"


def use_version(monkeypatch: pytest.MonkeyPatch, library: str, version: str) -> None:
    """Let a library have another version, as far as this project can tell."""
    really = provenance.version
    monkeypatch.setattr(provenance, "version", lambda name: version if name == library else really(name))


def stored(path: Path) -> list[StoredModel]:
    with ReferenceStore(path, PLENTY) as store:
        assert store.note is None
        assert store.check() == []
        return store.summary()


def listed(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["store", "list", "--path", str(path)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("library", LIBRARIES)
def test_another_version_of_a_library_computes_anew_and_keeps_what_is_there(
    library: str, reference: Callable[[], Said], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reference()
    assert (first.lines["reference"], first.notes) == (line(ROWS, 0, path), [])
    number = stored(path)[0].rows
    now = provenance.version(library)
    with monkeypatch.context() as patch:
        use_version(patch, library, "0.0.1")
        upgraded = reference()
        assert upgraded.lines["reference"] == line(ROWS, 0, path)
        why = f"computed with {library} {now}, now 0.0.1"
        assert upgraded.notes == [f"this run does not read {number} stored rows of its reference model: {why}"]
        again = reference()
        assert (again.lines["reference"], again.notes) == (line(0, ROWS, path), [])
    back = reference()
    assert (back.lines["reference"], back.notes) == (line(0, ROWS, path), [])
    assert sorted(model.versions[library] for model in stored(path)) == sorted([now, "0.0.1"])


def test_the_list_shows_torch_and_the_versions_that_differ(
    reference: Callable[[], Said], path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference()
    torch, peft = provenance.version("torch"), provenance.version("peft")
    (mine,) = [each for each in listed(path, monkeypatch, capsys).splitlines() if "lora_exp/tiny" in each]
    assert f"torch {torch} " in mine
    assert "peft" not in mine
    with monkeypatch.context() as patch:
        use_version(patch, "peft", "0.0.1")
        reference()
    models = [each for each in listed(path, monkeypatch, capsys).splitlines() if "lora_exp/tiny" in each]
    assert [f"torch {torch}, peft {version} " in model for version, model in zip(["0.0.1", peft], models, strict=True)]
    assert "note" not in listed(path, monkeypatch, capsys)


def write_earlier_store(path: Path) -> list[tuple[object, ...]]:
    """Write a store as lora_exp did before identities held versions; return its rows."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(
            "PRAGMA page_size = 8192; PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL; "
            f"BEGIN; {EARLIER_TABLES} PRAGMA application_id = {int.from_bytes(b'lora', 'big')}; "
            "PRAGMA user_version = 1; COMMIT;"
        )
    with ReferenceStore(path, PLENTY) as store:  # the checksums of values are as they were
        store.put(EARLIER, {}, {bytes([number]) * 16: b"1234" for number in range(5)})
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE models SET description = ?", (DESCRIPTION,))
    return earlier_rows(path)


def earlier_rows(path: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(
            "SELECT key, size, checksum, value FROM entries JOIN contents ON contents.id = entries.id "
            "WHERE model = (SELECT id FROM models WHERE identity = ?) ORDER BY key",
            (EARLIER,),
        ).fetchall()


def test_an_earlier_store_is_read_as_empty_says_so_once_and_loses_nothing(
    reference: Callable[[], Said], path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write_earlier_store(path)
    assert len(before) == 5
    (note,) = [each for each in listed(path, monkeypatch, capsys).splitlines() if "note" in each]
    assert "no run reads 5 rows of 1 model, 20 B: an earlier lora_exp stored them without the versions" in note

    first = reference()
    assert first.lines["reference"] == line(ROWS, 0, path)
    assert first.notes == [
        "this run does not read 5 stored rows of its reference model: "
        "an earlier lora_exp stored them without the versions of the libraries"
    ]
    second = reference()
    assert (second.lines["reference"], second.notes) == (line(0, ROWS, path), [])

    assert earlier_rows(path) == before
    assert len(stored(path)) == 2
    assert [each.name for each in path.parent.glob("reference.sqlite3.*-*")] == []


def test_a_file_that_is_moved_aside_before_the_run_reads_it_is_reported(tmp_path: Path) -> None:
    """A run opens its store first to see that it can be written; that opening moves a damaged file aside."""
    from tests.runs import run_in

    path = tmp_path / "reference.sqlite3"
    path.write_bytes(b"no database at all")
    rows = write_rows(tmp_path / "rows", pairs(ROWS))
    short = ["trainer=cpu", "trainer.max_steps=1", "trainer.eval_strategy=no", "samples.num_prompts=0"]
    with listening() as said:
        run_in(tmp_path / "run", ["recipe=dpo", *FEW, *short, f"store.path={path}", *rows])
    (note,) = [each for each in said.notes if str(path) in each]
    assert "reference.sqlite3.damaged-1" in note
    assert path.with_name("reference.sqlite3.damaged-1").read_bytes() == b"no database at all"
