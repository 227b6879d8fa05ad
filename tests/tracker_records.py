"""What each tracker holds of a run, read back with the tracker's own reader."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Record:
    """One run at a tracker.

    Args:
        history: Every logged number: name and step to value.
        events: The same by name, in the order in which it was logged, as often as it was.
        config: Flat: a leaf by its dotted key.
        summary: The final numbers.
        status: As `tracker.finish` was told.
        ending: The tracker's own word for it.
        about: `name`, `group`, `job_type`, `tags`, `notes`, where the tracker has a place for it.
        tables: Rows of text, by name.
        files: The adapter's, by path below its folder; None where the tracker keeps none.
    """

    history: dict[tuple[str, int], float] = field(default_factory=dict)
    events: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)
    status: str = ""
    ending: Any = None
    about: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    files: set[str] | None = None


def leaves(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found


def text(row: Mapping[str, Any]) -> dict[str, str]:
    return {key: "" if value is None else str(value) for key, value in row.items()}


# Readers -----------------------------------------------------------------------------------------------


def ended_records(folder: Path) -> list[Any]:
    """Return the records of an offline run, once W&B's own process has written its end."""
    from tests.smoke.test_multirun import offline_records

    deadline = time.monotonic() + 20
    while not (records := offline_records(folder)) or not any(each.HasField("exit") for each in records):
        assert time.monotonic() < deadline, "the record has no end"
        time.sleep(0.05)
    return records


def wandb_offline(folder: Path) -> Record:
    record = Record(files=set())
    for each in ended_records(folder):
        kind = each.WhichOneof("record_type")
        if kind == "run":
            run = each.run
            record.config |= {item.key: json.loads(item.value_json) for item in run.config.update}
            record.about = {"name": run.display_name, "group": run.run_group, "job_type": run.job_type}
            record.about |= {"tags": list(run.tags), "notes": run.notes}
        elif kind == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in each.history.item}
            step = row.pop("train/global_step", None)
            if step is not None:
                record.history |= {(name, step): value for name, value in row.items() if name[:5] in ("train", "eval/")}
        elif kind == "summary":
            for item in each.summary.update:
                record.summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        elif kind == "exit":
            record.ending = each.exit.exit_code
        elif kind == "artifact" and each.artifact.type == "model":
            record.files = {entry.path for entry in each.artifact.manifest.contents}
    for file in (folder / "wandb").glob("offline-run-*/files/media/table/*.table.json"):
        table = json.loads(file.read_text())
        rows = [text(dict(zip(table["columns"], row, strict=True))) for row in table["data"]]
        record.tables[file.name.split("_")[0]] = rows
    record.config = leaves({key: value for key, value in record.config.items() if key != "_wandb"})
    record.status = str(record.summary.pop("status", ""))
    return record


def tensorboard(folder: Path) -> Record:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    record = Record()
    for tag in events.Tags()["scalars"]:
        record.events[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
        for event in events.Scalars(tag):
            place, _, name = tag.partition("/")
            if place == "summary":
                record.summary[name] = event.value
            else:
                record.history[tag, event.step] = event.value
    for tag in events.Tags()["tensors"]:
        content = make_ndarray(events.Tensors(tag)[-1].tensor_proto)
        if content.ndim == 2:
            header, *rows = [[cell.decode() for cell in row] for row in content]
            record.tables[tag] = [dict(zip(header, row, strict=True)) for row in rows]
        elif tag == "status/text_summary":
            record.status = content.item().decode()
        elif tag == "config/text_summary":
            record.config |= leaves(json.loads(content.item()))
    record.about = {row["key"]: row["value"] for row in record.tables.pop("run")}
    record.about["tags"] = [tag for tag in record.about.get("tags", "").split(", ") if tag]
    hparams = events.summary_metadata
    begin = metadata.parse_session_start_info_plugin_data(hparams[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    record.config |= {key: getattr(value, value.WhichOneof("kind")) for key, value in begin.hparams.items()}
    end = metadata.parse_session_end_info_plugin_data(hparams[metadata.SESSION_END_INFO_TAG].plugin_data.content)
    record.ending = end.status
    return record


def mlflow(folder: Path) -> Record:
    from mlflow import MlflowClient

    client = MlflowClient("sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name("lora_exp")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.folder = '{folder}'")
    record = Record(config=dict(run.data.params), status=run.data.tags["status"], ending=run.info.status)
    for name in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, name)
        record.events[name] = [(each.step, each.value) for each in history]
        for each in history:
            if name.startswith(("train/", "eval/")):
                record.history[name, each.step] = each.value
            else:
                record.summary[name] = each.value
    tags = run.data.tags
    record.about = {key: tags.get(key) for key in ("group", "job_type")}
    record.about |= {"name": run.info.run_name, "tags": tags["tags"].split(", ") if "tags" in tags else []}
    record.about["notes"] = tags.get("mlflow.note.content")
    record.files = set()
    for artifact in client.list_artifacts(run.info.run_id):
        path = Path(client.download_artifacts(run.info.run_id, artifact.path))
        if path.is_dir():
            record.files = {each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file()}
        else:
            table = json.loads(path.read_text())
            record.tables[path.stem] = [text(dict(zip(table["columns"], row, strict=True))) for row in table["data"]]
    return record


def trackio(folder: Path) -> Record:
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = [run for run in Api().runs("lora_exp") if folder.name in run.name.split()]
    config = dict(run.config or {})
    record = Record(status=str(config.pop("status", "")), files=set())
    record.about = {"name": run.name, "group": config["_Group"]}
    record.config = leaves({key: value for key, value in config.items() if not key.startswith("_")})
    for row in SQLiteStorage.get_logs("lora_exp", run.name, run_id=run.id):
        for name, value in row.items():
            if isinstance(value, dict) and value.get("_type") == "trackio.table":
                record.tables[name] = [text(each) for each in value["_value"]]
            elif name.startswith(("train/", "eval/")):
                record.history[name, row["step"]] = value
                record.events.setdefault(name, []).append((row["step"], value))
            elif name.startswith("summary/"):
                record.summary[name.partition("/")[2]] = value
    manifest = SQLiteStorage.get_artifact_manifest("lora_exp", f"adapter-{run.id}", "latest")
    record.files = {entry["path"] for entry in manifest["manifest"]} if manifest else set()
    return record


READERS: dict[str, Callable[[Path], Record]] = {
    "wandb": wandb_offline,
    "tensorboard": tensorboard,
    "mlflow": mlflow,
    "trackio": trackio,
}


def written(folder: Path) -> dict[tuple[str, int], float]:
    """Return what `metrics.jsonl` holds, under the names that trackers show."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            found[f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}", step] = value
    return found


def differences(found: Mapping[Any, Any], expected: Mapping[Any, float], single: bool) -> dict[Any, Any]:
    """Return what is not the same in both, with both values; TensorBoard keeps 32 bits of a number."""
    kept = {key: float(np.float32(value)) if single else value for key, value in expected.items()}
    return {key: (found.get(key), kept.get(key)) for key in {**found, **kept} if found.get(key) != kept.get(key)}
