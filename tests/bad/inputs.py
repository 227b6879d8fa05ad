"""Bad input, and what must be said of it: a table of rows, files, keys, sweeps, folders and environments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any] | bytes
SFT = ("data=splits", "data.train_file=t.jsonl", "trainer.eval_strategy=no")
DPO = ("recipe=dpo", *SFT)
HUB = ("data=hub", "data.path=json")
GOOD: dict[str, Any] = {"prompt": "Where is it?", "chosen": "On its way.", "rejected": "No idea."}
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Args:
        name: What is bad about it.
        says: What the answer must hold: the place and the reason.
        arguments: The command's.
        files: What lies in the folder, by path.
        environment: Variables that are set.
    """

    name: str
    says: str
    arguments: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def record(**changes: Any) -> dict[str, Any]:
    """Return a DataRecord; `inputs__question=...` replaces a value, and None with a trailing `__` takes one out."""
    row: dict[str, Any] = {
        "id": "row-2",
        "schema_version": "1.0",
        "inputs": {"question": "Where?", "context": None},
        "outputs": {"answer": "There."},
        "meta": {"source": "table", "timestamp": "2026-01-05T08:11:00Z", "tags": []},
    }
    for path, value in changes.items():
        *sections, key = path.removesuffix("__").split("__")
        place = row
        for section in sections:
            place = place[section]
        if path.endswith("__"):
            del place[key]
        else:
            place[key] = value
    return row


def lines(*rows: Row) -> bytes:
    """Return rows as JSON Lines; bytes stand as they are."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def talk(*messages: Any) -> dict[str, Any]:
    """Return a messages row of (role, content) pairs."""
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


RECORDS: list[tuple[dict[str, Any], str]] = [
    ({"id__": None}, "id: is missing"),
    ({"id": ""}, "id: is empty"),
    ({"id": 7}, "id: should be a string, not a number"),
    ({"schema_version": "2.0"}, "schema_version: should be '1.0', not '2.0'"),
    ({"schema_version": 1.0}, "schema_version: should be '1.0', not a number"),
    ({"inputs__": None}, "inputs: is missing"),
    ({"inputs__question__": None}, "inputs.question: is missing"),
    ({"inputs__question": "  "}, "inputs.question: is empty"),
    ({"inputs__question": ["a"]}, "inputs.question: should be a string, not a list"),
    ({"inputs__context": 3}, "inputs.context: should be a string, not a number"),
    ({"outputs__answer__": None}, "outputs.answer: is missing"),
    ({"outputs__answer": ""}, "outputs.answer: is empty"),
    ({"outputs__answer": None}, "outputs.answer: should be a string, not null"),
    ({"outputs": "There."}, "outputs: should be an object, not a string"),
    ({"meta__": None}, "meta: is missing"),
    ({"meta__timestamp": "yesterday"}, "meta.timestamp: 'yesterday' is not an ISO 8601 time"),
    ({"meta__timestamp": 1700000000}, "meta.timestamp: should be a string, not a number"),
    ({"meta__tags": "billing"}, "meta.tags: should be a list, not a string"),
    ({"meta__tags": [""]}, "meta.tags.0: is empty"),
    ({"meta__source": None}, "meta.source: should be a string, not null"),
]
"""Changes of a good DataRecord on line 2, and the reason given there."""

PREFERENCES: list[tuple[str, Row, str]] = [
    ("blank prompt", {**GOOD, "prompt": ""}, "prompt: is empty"),
    ("blank answer", {**GOOD, "chosen": " \n"}, "chosen: is empty"),
    ("null for an answer", {**GOOD, "rejected": None}, "rejected: should be a string, not null"),
    ("number for a prompt", {**GOOD, "prompt": 5}, "prompt: should be a string, not a number"),
    ("object for an answer", {**GOOD, "chosen": {"a": 1}}, "chosen: should be a string, not an object"),
    ("no second answer", {"prompt": "a", "chosen": "b"}, "rejected: is missing"),
    ("no JSON", b"{oops", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
    ("single quotes", b"{'prompt': 'a'}", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
    ("a comma too many", b'{"prompt": "a",}', "not JSON: Expecting property name enclosed in double quotes"),
    ("a list", b"[1, 2]", "a row must be an object, not a list"),
    ("a string", b'"row"', "a row must be an object, not a string"),
    ("a number", b"12", "a row must be an object, not a number"),
    ("null", b"null", "a row must be an object, not null"),
    ("two objects", b"{} {}", "not JSON: Extra data (column 4)"),
    ("Latin-1", '{"prompt": "café"}'.encode("latin-1"), "not UTF-8 (byte 16 of the line)"),
    ("NUL", b'{"prompt": "a\x00b"}', "has NUL bytes (the first is byte 14 of the line)"),
    ("NaN", b'{"prompt": "a", "score": NaN}', "not JSON: NaN; a row may only have numbers that are finite"),
    ("Infinity", b'{"prompt": "a", "score": -Infinity}', "not JSON: -Infinity; a row may only have numbers"),
    ("half a surrogate pair", {**GOOD, "prompt": "a \ud800"}, "prompt: has half a surrogate pair"),
    ("a key twice", b'{"prompt": "a", "prompt": "b"}', "an object has the key 'prompt' twice"),
    ("nested deeply", b'{"prompt": ' + b"[" * 9999 + b"]" * 9999 + b"}", "is nested too deeply"),
]
"""Line 2 of a file of preference rows, and the reason given there."""

CONVERSATIONS: list[tuple[str, Row, str]] = [
    ("no messages", {"messages": []}, "messages: is empty"),
    ("unknown role", talk(("human", "a"), ("assistant", "b")), "messages.0.role: should be 'system', 'user'"),
    ("no answer", talk(("user", "a")), "messages.0.role: the last message should be the assistant's"),
    ("blank message", talk(("user", "a"), ("assistant", " ")), "messages.1.content: is empty"),
    ("null for a message", talk(("user", None), ("assistant", "b")), "messages.0.content: "),
    (
        "two systems",
        talk(("system", "x"), ("system", "y"), ("user", "a"), ("assistant", "b")),
        "messages.1.role: is a second system",
    ),
    ("a string for messages", {"messages": "hello"}, "messages: should be a list, not a string"),
    ("another format", {"prompt": "a", "completion": "b"}, "is a prompt-completion row, the file began with messages"),
]
"""Line 2 of a file of conversations, and the reason given there."""

FILES: list[tuple[str, tuple[str, ...], dict[str, bytes], str]] = [
    ("rows of the other recipe, SFT", DPO, {"t.jsonl": lines(record())}, "looks like a DataRecord row: recipe=sft"),
    ("rows of the other recipe, DPO", SFT, {"t.jsonl": lines(GOOD)}, "looks like a preference row: recipe=dpo"),
    ("rows of no format", SFT, {"t.jsonl": lines({"text": "a"})}, "t.jsonl:1: has text, which is no row of these"),
    ("UTF-16", DPO, {"t.jsonl": lines(GOOD).decode().encode("utf-16")}, "t.jsonl: is UTF-16, not UTF-8"),
    ("an empty file", DPO, {"t.jsonl": b""}, "t.jsonl: has no rows"),
    ("blank lines only", DPO, {"t.jsonl": b"\n \n\n"}, "t.jsonl: has no rows"),
    ("a byte-order mark only", DPO, {"t.jsonl": b"\xef\xbb\xbf"}, "t.jsonl: has no rows"),
    ("an id twice", SFT, {"t.jsonl": lines(record(), record())}, "t.jsonl:2: has the same id as line 1"),
    ("no such file", DPO, {}, "t.jsonl: there is no such file"),
    ("another name", DPO, {"train.jsonl": lines(GOOD)}, ". has train.jsonl"),
    ("a folder for a file", DPO, {"t.jsonl/x": b""}, "t.jsonl: is a folder, not a file"),
    ("no such folder", ("data=splits", "data.splits_dir=d"), {}, "the folder d does not exist"),
    ("a folder without rows", ("data=splits", "data.splits_dir=d"), {"d/x.txt": b""}, "d has no .jsonl"),
    (
        "no rows to evaluate on",
        ("data=splits", "data.splits_dir=d"),
        {"d/train.jsonl": lines(record())},
        "d/val.jsonl: there is no such file",
    ),
    (
        "a damaged gz",
        (*DPO, "data.train_file=t.jsonl.gz"),
        {"t.jsonl.gz": b"\x1f\x8b\x08\x00garbage"},
        "t.jsonl.gz: is damaged",
    ),
    ("no zstd", (*DPO, "data.train_file=t.jsonl.zst"), {"t.jsonl.zst": b"garbage"}, "t.jsonl.zst: is no zstd file"),
    ("no Parquet", (*DPO, "data.train_file=t.parquet"), {"t.parquet": b"garbage"}, "t.parquet: is no Parquet file"),
    ("a spreadsheet", (*DPO, "data.train_file=t.xlsx"), {"t.xlsx": b"PK\x03\x04"}, "t.xlsx:1: not JSON"),
    (
        "rows of train in val",
        ("recipe=dpo", "data=splits", "data.train_file=t.jsonl", "data.val_file=v.jsonl", "data.on_leak=error"),
        {"t.jsonl": lines(GOOD), "v.jsonl": lines(GOOD)},
        "v.jsonl:1: is the same row as t.jsonl:1",
    ),
    (
        "columns that fit no format",
        (*HUB, "+data.data_files={train:t.jsonl}", "data.val_split=null", "trainer.eval_strategy=no"),
        {"t.jsonl": lines({"ask": "a", "tell": "b"})},
        "map ours to theirs: +data.columns.prompt=...",
    ),
    ("a data set that is not there", ("data=hub", "data.path=./nothing"), {}, "data.path=./nothing"),
]  # fmt: skip

KEYS: list[tuple[str, str]] = [
    ("trainer.max_step=4", "did you mean trainer.max_steps?"),
    ("trainer.max_steps=ten", "trainer.max_steps: should be integer, not 'ten'"),
    ("trainer.max_steps=0", "trainer.max_steps: 0 steps cannot be trained"),
    ("trainer.max_steps=-5", "trainer.max_steps: -5 steps cannot be trained"),
    ("trainer.per_device_train_batch_size=0", "should be greater than 0, not 0"),
    ("trainer.gradient_accumulation_steps=1.5", "should be integer, not 1.5"),
    ("trainer.num_train_epochs=0", "should be greater than 0, not 0"),
    ("trainer.learning_rate=-1", "should be greater than or equal to 0, not -1"),
    ("trainer.learning_rate=fast", "should be number, not 'fast'"),
    ("trainer.optim=adamx", "trainer.optim: should be one of adamw_torch, "),
    ("trainer.lr_scheduler_type=cosin", "(did you mean cosine?)"),
    ("trainer.eval_strategy=daily", "should be 'no', 'steps' or 'epoch', not 'daily'"),
    ("trainer.bf16=maybe", "should be boolean or 'auto', not 'maybe'"),
    ("trainer.warmup_steps=-1", "should be greater than or equal to 0, not -1"),
    ("trainer.save_total_limit=0", "should be greater than 0, not 0"),
    ("trainer.load_best_model_at_end=true trainer.save_strategy=no", "cannot be loaded if none is saved"),
    ("trainer.fp16=true trainer.bf16=true", "bf16 and fp16 cannot both be on"),
    ("+trainer.typo=1", "transformers.TrainingArguments has no such field"),
    ("+trainer.output_dir=x", "use output_dir=..."),
    ("lora.r=0", "lora.r: should be greater than 0, not 0"),
    ("lora.r=8.5", "lora.r: should be integer, not 8.5"),
    ("lora.lora_dropout=1", "should be less than 1, not 1"),
    ("lora.target_modules=[]", "should be auto, or names of layers"),
    ("lora.init_lora_weights=pisa", "(did you mean pissa?)"),
    ("lora=pissa quant=8bit", "PiSSA writes into the base weights"),
    ("recipe=dop", "did you mean recipe=dpo?"),
    ("recipe=null", "choose dpo, sft"),
    ("model=custom", "add model.pretrained_model_name_or_path=..."),
    ("model=tinny", "did you mean model=tiny?"),
    ("model=custom model.pretrained_model_name_or_path=./nowhere", "there is no folder ./nowhere"),
    ("model.dtype=int7", "model.dtype: should be 'auto', 'float32', 'bfloat16' or 'float16'"),
    ("model.adapter=nowhere", "model.adapter: there is no folder nowhere"),
    ("quant=16bit", "choose 4bit, 8bit, none"),
    ("quant=8bit quant.llm_int8_threshold=5.0", "a row's numbers would depend on the rows beside it"),
    ("quant=8bit +quant.llm_int8_threshold=5.0", "a row's numbers would depend on the rows beside it"),
    ("quant=8bit +quant.llm_int8_has_fp16_weight=true", "its weights stay in 8 bits"),
    ("quant=8bit +quant.llm_int8_skip_modules=q_proj", "should be names of layers, such as [lm_head,q_proj]"),
    ("quant=4bit +quant.llm_int8_skip_modules=[lm_head,null]", "should be names of layers, such as [lm_head,q_proj]"),
    ("quant=8bit +quant.llm_int8_skip_modules=['*.mlp',lm_head]", "'*.mlp' is none: nothing to repeat"),
    ("trainer.output_dir=here", "use output_dir=..."),
    ("device=gpu", "auto, cpu, cuda, cuda:1, mps or xpu"),
    ("device=cuda:", "auto, cpu, cuda, cuda:1, mps or xpu"),
    ("device=cuda trainer=cpu", "trainer.use_cpu=false, or device=cpu"),
    ("device=cpu trainer=gpu_fp16", "fp16 training needs a GPU"),
    ("recipe=dpo recipe.beta=0", "recipe.beta: should be greater than 0, not 0"),
    ("recipe=dpo recipe.beta=abc", "recipe.beta: should be number, not 'abc'"),
    ("recipe.beta=0.1", "it belongs to recipe=dpo"),
    ("recipe=dpo recipe.loss_type=sigmod", "(did you mean sigmoid?)"),
    ("recipe=dpo recipe.loss_type=robust recipe.label_smoothing=0.5", "a share of flipped labels below 0.5"),
    ("recipe.max_length=1", "should be greater than 1, not 1"),
    ("recipe.max_length=", "recipe.max_length: should be integer, not ''"),
    ("recipe.max_prompt_length=512", "512 leaves no room for an answer"),
    ("recipe.truncation_side=top", "should be 'left' or 'right', not 'top'"),
    ("max_length=64", "did you mean recipe.max_length?"),
    ("seed=-1", "seed: should be greater than or equal to 0, not -1"),
    ("seed=abc", "seed: should be integer, not 'abc'"),
    ("engine=fast", "choose packed, padded"),
    ("engine.tokens_per_microbatch=0", "should be greater than 0 or 'auto', not 0"),
    ("engine.num_threads=0", "should be greater than 0 or 'auto', not 0"),
    ("store.max_size=lots", "a size with its unit, such as 2GB"),
    ("store.max_size=0", "a size with its unit, such as 2GB"),
    ("tracker=wandbb", "did you mean tracker=wandb?"),
    ("data.chat_template=maybe", "should be 'auto' or boolean, not 'maybe'"),
    ("data=splits data.train_file=x.jsonl", "there is no evaluation data"),
    ("samples.num_prompts=-1", "should be greater than or equal to 0, not -1"),
    ("objective=eval_lss", "did you mean eval_loss?"),
    ("objective=[]", "a list that is not empty, not []"),
    ("direction=up", "should be 'minimize' or 'maximize'"),
    ("output_dir=", "output_dir: is empty"),
    ("resume=nowhere", "resume: there is no folder nowhere"),
    ("--config-dir nowhere", "--config-dir: there is no folder"),
    ("=", "=: there is no such key"),
    ("trainer", "write key=value"),
    ("a=b=c", "write key=value"),
    ("+", "+: is no override: it ends too soon"),
]

SWEEPS: list[tuple[str, str]] = [
    ("recipe.bata=1,2", "did you mean recipe.beta of recipe=dpo?"),
    ("recipe=dpo recipe.beta=interval(0.5,0.1)", "interval(0.5, 0.1) runs from high to low"),
    ("recipe=dpo recipe.beta=interval(0.1,0.5)", "a grid takes values, not a range to draw from"),
    ("recipe=dpo recipe.beta=", "recipe.beta: should be number, not ''"),
    ("quant=none quant.bnb_4bit_quant_type=nf4,fp4", "it belongs to quant=4bit"),
    ("objective=eval_rewards/margins seed=1,2", "recipe=sft never logs eval_rewards/margins"),
    ("seed=range(0,10000)", "this command means 10,000 trials"),
    ("sweep.name=../x seed=1,2", "should be a name for a folder"),
    ("sweep.seeds=0 seed=1,2", "sweep.seeds: should be greater than 0, not 0"),
    ("hydra/sweeper=optuna recipe=dpo recipe.beta=0.1", "there is nothing to search"),
    ("hydra/sweeper=optuna hydra/sweeper/sampler=tp recipe=dpo recipe.beta=interval(0.1,0.5)", "random tpe"),
]

OWN_YAML = b"# @package _global_\ntrainer: {%s\n"
FOLDERS: list[tuple[str, str, dict[str, bytes], str]] = [
    (
        "it holds a run",
        "output_dir=run",
        {"run/run.json": b'{"status": "finished"}', "run/metrics.jsonl": b"{}\n"},
        "go on with resume=run",
    ),
    ("it is a file", "output_dir=run", {"run": b"text"}, "output_dir: run is a file"),
    ("it lies below a file", "output_dir=run/x", {"run": b"text"}, "output_dir: run is a file"),
    ("no run to go on with", "resume=run", {"run/x": b""}, "resume: run holds no run"),
    ("no adapter in it", "model.adapter=a", {"a/x": b""}, "model.adapter: a holds no adapter"),
    (
        "an adapter as a pickle",
        "model.adapter=a",
        {"a/adapter_config.json": b'{"peft_type": "LORA"}', "a/adapter_model.bin": b"x"},
        "a pickle may run any code, so none is read",
    ),
    (
        "a model as a pickle",
        "model=custom model.pretrained_model_name_or_path=./m",
        {"m/config.json": b"{}", "m/pytorch_model.bin": b"x"},
        "a pickle may run any code, so none is read",
    ),
    ("no model in it", "model=custom model.pretrained_model_name_or_path=./m", {"m/x": b""}, "has no config.json"),
    (
        "configs with a wrong key",
        "--config-dir mine experiment=x",
        {"mine/experiment/x.yaml": OWN_YAML % b"max_step: 4}"},
        "did you mean trainer.max_steps?",
    ),
    (
        "configs that are no YAML",
        "--config-dir mine experiment=x",
        {"mine/experiment/x.yaml": OWN_YAML % b"max_steps: ["},
        "x.yaml:3: is no YAML",
    ),
]

ENVIRONMENTS: list[tuple[str, str, dict[str, str], str]] = [
    ("a cache below a file", "recipe=dpo", {"LORA_EXP_CACHE": "f/cache"}, "f/cache/reference.sqlite3 cannot be used"),
    ("a key of W&B typed", "+tracker.api_key=abc", {}, "tracker.api_key"),
    ("a token typed", "+trainer.hub_token=hf_abcdefghijklmnopqrstuvwxyz", {}, "trainer.hub_token"),
]


def table() -> Iterator[Bad]:
    """Yield every bad input."""
    for changes, says in RECORDS:
        name = " ".join(f"{path}={value!r}" for path, value in changes.items())
        yield Bad(
            f"record {name}", f"t.jsonl:2: {says}", SFT, {"t.jsonl": lines(record(id="row-1"), record(**changes))}
        )
    for first, rows, arguments in ((GOOD, PREFERENCES, DPO), (TALK, CONVERSATIONS, SFT)):
        for name, row, says in rows:
            yield Bad(f"row: {name}", f"t.jsonl:2: {says}", arguments, {"t.jsonl": lines(first, row)})
    for name, given, files, says in FILES:
        yield Bad(f"file: {name}", says, given, files)
    for line, says in KEYS:
        yield Bad(f"key: {line}", says, tuple(line.split()))
    for line, says in SWEEPS:
        yield Bad(f"sweep: {line}", says, ("-m", *line.split()))
    for name, line, files, says in FOLDERS:
        yield Bad(f"folder: {name}", says, tuple(line.split()), files)
    for name, line, environment, says in ENVIRONMENTS:
        yield Bad(f"environment: {name}", says, tuple(line.split()), {"f": b"text"}, environment)
