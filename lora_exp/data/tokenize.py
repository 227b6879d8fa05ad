"""Rows of strings into token ids, cut to their limits, with an account of what was cut and dropped.

TRL 1.x has no `max_prompt_length` and cuts without a word; here the prompt is cut first (at its start, unless told
otherwise, so that the words next to the answer stay), then each answer at its end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from lora_exp.data.lengths import RowLengths
from lora_exp.errors import Problem, UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from lora_exp.data.load import Split

BATCH = 512
"""Rows that are handed to the tokenizer at a time."""

Ids = list[int]


@dataclass(frozen=True)
class Limits:
    """How long a row may be, in tokens. `max_prompt_length` None: the prompt may fill `max_length`."""

    max_length: int
    max_prompt_length: int | None
    truncation_side: Literal["left", "right"]


@dataclass
class SplitReport:
    """What became of a split's rows."""

    source: str
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason to number of rows."""
    cut_prompts: int = 0
    cut_prompt_tokens: int = 0
    cut_answers: int = 0
    cut_answer_tokens: int = 0
    prompt_lengths: list[int] = field(default_factory=list)
    answer_lengths: list[int] = field(default_factory=list)
    longest_row: int = 0
    """Tokens of a prompt with the longest of its answers."""
    lengths: RowLengths = field(default_factory=RowLengths)
    """Of every row, before anything was cut."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report for `data_report.json`, lengths as min, median and max over what was kept."""
        summary = asdict(replace(self, lengths=RowLengths()))
        del summary["lengths"]
        for name in ("prompt_lengths", "answer_lengths"):
            lengths = summary.pop(name)
            spread = {"min": min(lengths), "median": median(lengths), "max": max(lengths)} if lengths else None
            summary[name] = spread
        summary["answer_tokens"] = sum(self.answer_lengths)
        return summary


@dataclass(frozen=True)
class TokenizedData:
    """The rows of every split as token ids, with what they were and what became of them."""

    tokenizer: Any
    splits: dict[str, Split]
    datasets: dict[str, Dataset]
    reports: dict[str, SplitReport]

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row of all splits."""
        return max(report.longest_row for report in self.reports.values())

    def require_rows(self) -> None:
        """Check that every split has something left to learn from, or to evaluate on.

        Raises:
            UserError: The splits that have not, with the reasons.
        """
        problems = [
            Problem(
                report.source,
                f"none of its {report.rows} rows is left: "
                + ", ".join(f"{number} {reason}" for reason, number in report.dropped.items()),
                "raise recipe.max_length, or lower recipe.max_prompt_length",
            )
            for report in self.reports.values()
            if not report.kept
        ]
        if problems:
            raise UserError("nothing is left to learn from", problems)


def use_chat_template(setting: bool | str, tokenizer: Any) -> bool:
    """Resolve `data.chat_template`: `auto` means wherever the tokenizer has one."""
    return bool(tokenizer.chat_template) if setting == "auto" else bool(setting)


def tokenize_splits(
    splits: dict[str, Split],
    answers: tuple[str, ...],
    tokenizer: Any,
    limits: Mapping[str, Limits],
    chat_template: bool | str,
) -> TokenizedData:
    """Tokenise every split, or find what an earlier job of this process made of the same rows.

    Args:
        splits: Rows of strings.
        answers: The columns that are learned from.
        tokenizer: The model's.
        limits: How long a row may be, by split.
        chat_template: `data.chat_template`: whether rows go through the tokenizer's template; `auto`: if it has one.

    Raises:
        UserError: If a template is asked for and there is none.
    """
    if chat_template is True and not tokenizer.chat_template:
        problem = Problem("data.chat_template", "the tokenizer has no chat template", "data.chat_template=auto")
        raise UserError("the rows cannot be tokenised", [problem])
    template = use_chat_template(chat_template, tokenizer)
    asked = (answers, limits, template, _fingerprint(tokenizer))
    for before, data in _KEPT:
        if before == asked and data.splits == splits:
            return data
    datasets, reports = {}, {}
    for name, split in splits.items():
        made = tokenize_split(split.rows, answers, tokenizer, limits[name], template, split.source)
        datasets[name], reports[name] = made
    data = TokenizedData(tokenizer, splits, datasets, reports)
    _KEPT.append((asked, data))
    return data


_KEPT: deque[tuple[Any, TokenizedData]] = deque(maxlen=4)
"""What the last jobs of this process trained on; a sweep over `max_length` goes to and fro between a few."""


def _fingerprint(tokenizer: Any) -> tuple[Any, ...]:
    """Return what decides how a text becomes ids; a tokenizer that cannot say it equals no other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    how = backend.to_str() if backend is not None else object()
    return how, tokenizer.chat_template, tokenizer.eos_token


def tokenize_split(
    rows: Sequence[dict[str, str]],
    answers: tuple[str, ...],
    tokenizer: Any,
    limits: Limits,
    chat_template: bool,
    source: str,
) -> tuple[Dataset, SplitReport]:
    """Tokenise the rows of a split and cut them to the limits.

    Returns:
        A dataset with `row` (the row's index in `rows`), `prompt_ids` and `<answer>_ids` for each answer, in order,
        less the dropped rows; and the report of what was cut and dropped.
    """
    from datasets import Dataset

    report = SplitReport(source)
    columns: dict[str, list[Any]] = {"row": [], "prompt_ids": [], **{f"{name}_ids": [] for name in answers}}
    for row, (prompt, *completions) in enumerate(_token_ids(rows, answers, tokenizer, chat_template)):
        cut = _cut(prompt, completions, limits, report)
        if cut is None:
            continue
        for column, value in zip(columns.values(), [row, *cut], strict=True):
            column.append(value)
    return Dataset.from_dict(columns), report


def _token_ids(
    rows: Sequence[dict[str, str]], answers: tuple[str, ...], tokenizer: Any, chat_template: bool
) -> Iterator[list[Ids]]:
    """Yield each row's prompt ids and answer ids, uncut.

    As TRL 1.16 does it, the prompt and prompt+answer are tokenised as wholes and split where they part: tokens
    may merge across the boundary, and a template may render the prompt alone differently.
    """
    remaining = iter(rows)
    while batch := list(islice(remaining, BATCH)):
        texts = [text for row in batch for text in _render(row, answers, tokenizer, chat_template)]
        ids = tokenizer(texts, add_special_tokens=not chat_template)["input_ids"]
        width = 1 + len(answers)
        for start in range(0, len(ids), width):
            prompt, *wholes = ids[start : start + width]
            shared = min(_common_prefix_length(prompt, whole) for whole in wholes)
            yield [prompt[:shared], *(whole[shared:] for whole in wholes)]


def _render(row: dict[str, str], answers: tuple[str, ...], tokenizer: Any, chat_template: bool) -> list[str]:
    """Return the prompt's text and, for each answer, the text of both; an answer ends with the end token."""
    prompt = row["prompt"]
    if not chat_template:
        end = tokenizer.eos_token or ""
        return [prompt, *(f"{prompt}{row[name].removesuffix(end)}{end}" for name in answers)]
    asked = [{"role": "user", "content": prompt}]
    texts = [tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)]
    for name in answers:
        told = [*asked, {"role": "assistant", "content": row[name]}]
        texts.append(tokenizer.apply_chat_template(told, tokenize=False))
    return texts


def _common_prefix_length(first: Ids, second: Ids) -> int:
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _cut(prompt: Ids, completions: list[Ids], limits: Limits, report: SplitReport) -> list[Ids] | None:
    """Cut one row and account for it; None where nothing is left to learn from."""
    report.rows += 1
    report.lengths.add(prompt, completions)
    limit = limits.max_length if limits.max_prompt_length is None else limits.max_prompt_length
    short_prompt = prompt
    if len(prompt) > limit:
        short_prompt = prompt[-limit:] if limits.truncation_side == "left" else prompt[:limit]
    room = limits.max_length - len(short_prompt)
    short = [ids[:room] for ids in completions]

    reason = _nothing_left(completions, short)
    if reason is not None:
        report.dropped[reason] += 1
        return None
    report.kept += 1
    report.cut_prompts += len(short_prompt) < len(prompt)
    report.cut_prompt_tokens += len(prompt) - len(short_prompt)
    for whole, part in zip(completions, short, strict=True):
        report.cut_answers += len(part) < len(whole)
        report.cut_answer_tokens += len(whole) - len(part)
    report.prompt_lengths.append(len(short_prompt))
    report.answer_lengths += [len(ids) for ids in short]
    report.longest_row = max(report.longest_row, len(short_prompt) + max(map(len, short)))
    return [short_prompt, *short]


def _nothing_left(completions: list[Ids], short: list[Ids]) -> str | None:
    """Say why a row has nothing to learn from after cutting: an answer is gone, or the answers are the same."""
    if any(not ids for ids in short):
        return "answer cut away" if all(completions) else "empty answer"
    if len(short) > 1 and all(ids == short[0] for ids in short[1:]):
        same_before = all(ids == completions[0] for ids in completions[1:])
        return "answers equal" if same_before else "answers equal after cutting"
    return None
