"""Rows into token ids, cut to their limits, with an account of what was cut and dropped.

TRL 1.x has no `max_prompt_length` and cuts without a word; here the prompt is cut first (at its start, unless told
otherwise, so that the words next to the answer stay), then each answer at its end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from lora_exp.data.cache import NO_CACHE, Cache
from lora_exp.data.chat import RefusedError
from lora_exp.data.encode import Encoded, Ids, encode_rows
from lora_exp.data.lengths import RowLengths
from lora_exp.data.template import Refusals
from lora_exp.data.token_cache import kept_tokens, token_key
from lora_exp.errors import Problem, UserError, count

if TYPE_CHECKING:
    from datasets import Dataset

    from lora_exp.data.split import Split


CUT_AWAY, EQUAL_ONCE_CUT = "answer cut away", "answers equal after cutting"
LOST_TO_LIMITS = (CUT_AWAY, EQUAL_ONCE_CUT)
"""Why rows are dropped that longer limits would keep."""


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
    format: str = ""
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason to number of rows."""
    cut_prompts: int = 0
    cut_prompt_tokens: int = 0
    cut_answers: int = 0
    cut_answer_tokens: int = 0
    """Like all that is said of answers, of their tokens that carry the loss."""
    prompt_lengths: list[int] = field(default_factory=list)
    answer_lengths: list[int] = field(default_factory=list)
    longest_row: int = 0
    """Tokens of a prompt with the longest of its answers."""
    unended: int = 0
    """Rows with an answer that no special token ends, from which a model does not learn to stop."""
    lengths: RowLengths = field(default_factory=RowLengths)
    """Of every row, before anything was cut."""

    @property
    def lost_to_limits(self) -> bool:
        """Whether rows were dropped that longer limits would have kept."""
        return any(self.dropped[reason] for reason in LOST_TO_LIMITS)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for `data_report.json`, lengths as min, median and max over what was kept."""
        # asdict makes pairs into the keys of a Counter (Python 3.11).
        summary = {**vars(self), "dropped": dict(self.dropped)}
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
    kept: frozenset[str] = frozenset()
    """The splits whose token ids an earlier run had made."""

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
                f"none of its {count(report.rows, 'row')} is left: "
                + ", ".join(f"{number} {reason}" for reason, number in report.dropped.items()),
                "raise recipe.max_length, or lower recipe.max_prompt_length"
                if report.lost_to_limits
                else "give it rows with answers that differ and are not empty",
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
    cache: Cache = NO_CACHE,
) -> TokenizedData:
    """Tokenise every split, or find what an earlier job of this process, or another run, made of the same rows.

    Args:
        splits: Rows of strings or of messages.
        answers: The columns that are learned from.
        tokenizer: The model's.
        limits: How long a row may be, by split.
        chat_template: `data.chat_template`: whether rows go through the tokenizer's template; `auto`: if it has one.
        cache: Where token ids are kept between runs.

    Raises:
        UserError: If a template is needed and there is none, or it cannot take some rows.
    """
    template = _template_for(splits, chat_template, tokenizer)
    asked = (answers, limits, template, _fingerprint(tokenizer))
    for before, data in _KEPT:
        if before == asked and data.splits == splits:
            return data
    datasets, reports, kept, problems = {}, {}, set(), []
    for name, split in splits.items():
        key = token_key(split, {"answers": answers, "template": template}, limits[name], tokenizer)
        how = (answers, tokenizer, limits[name], template, split.source, split.format)
        try:
            made, was_kept = kept_tokens(cache, key, partial(tokenize_split, split.rows, *how), split)
        except UserError as error:
            problems += error.problems
        else:
            datasets[name], reports[name] = made
            kept |= {name} if was_kept else set()
    if problems:
        raise UserError(REFUSED, problems)
    data = TokenizedData(tokenizer, splits, datasets, reports, frozenset(kept))
    _KEPT.append((asked, data))
    return data


REFUSED = "the rows cannot be tokenised"


def _template_for(splits: Mapping[str, Split], setting: bool | str, tokenizer: Any) -> bool:
    template = use_chat_template(setting, tokenizer)
    if template and not tokenizer.chat_template:
        why, mend = "the tokenizer has no chat template", "data.chat_template=auto"
        raise UserError(REFUSED, [Problem("data.chat_template", why, mend)])
    talking = [split for split in splits.values() if split.rows and _of_messages(split.rows[0])]
    if talking and not template:
        off = "data.chat_template=false" if setting is False else "the tokenizer has no chat template"
        why = f"messages are put together by a chat template, and {off}"
        mend = "data.chat_template=auto" if setting is False else "name one: data.chat_template_path=my.jinja"
        raise UserError(REFUSED, [Problem(split.source, why, mend) for split in talking])
    return template


def _of_messages(row: Mapping[str, Any]) -> bool:
    return any(isinstance(value, list) for value in row.values())


_KEPT: deque[tuple[Any, TokenizedData]] = deque(maxlen=4)
"""What the last jobs of this process trained on; a sweep over `max_length` goes to and fro between a few."""


def _fingerprint(tokenizer: Any) -> tuple[Any, ...]:
    """Return what decides how a text becomes ids; a tokenizer that cannot say it equals no other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    how = backend.to_str() if backend is not None else object()
    return how, tokenizer.chat_template, tokenizer.eos_token


def tokenize_split(
    rows: Sequence[Mapping[str, Any]],
    answers: tuple[str, ...],
    tokenizer: Any,
    limits: Limits,
    chat_template: bool,
    source: str,
    format: str = "",  # noqa: A002 - what the report calls it
) -> tuple[Dataset, SplitReport]:
    """Tokenise the rows of a split and cut them to the limits.

    Returns:
        A dataset with `row` (the row's index in `rows`), `prompt_ids` and `<answer>_ids` for each answer, in order,
        less the dropped rows; where rows are conversations also `<answer>_mask`, 1 where a token carries the loss. And
        the report of what was cut and dropped.

    Raises:
        UserError: Rows that the chat template cannot take.
    """
    from datasets import Dataset

    report, refusals = SplitReport(source, format), Refusals(source, tokenizer)
    columns: dict[str, list[Any]] = {"row": [], "prompt_ids": [], **{f"{name}_ids": [] for name in answers}}
    masks: list[list[int] | None] = []
    for row, encoded in enumerate(encode_rows(rows, answers, tokenizer, chat_template)):
        if isinstance(encoded, RefusedError):
            refusals.add(row, encoded)
            continue
        cut = _cut(encoded, limits, report)
        if cut is None:
            continue
        report.unended += not encoded.ended
        masks.append(cut.scored)
        for column, value in zip(columns.values(), [row, cut.prompt, *cut.answers], strict=True):
            column.append(value)
    if problems := refusals.problems():
        raise UserError(REFUSED, problems)
    if any(masks):
        told = columns[f"{answers[0]}_ids"]
        columns[f"{answers[0]}_mask"] = [mask or [1] * len(ids) for mask, ids in zip(masks, told, strict=True)]
    return Dataset.from_dict(columns), report


def _cut(row: Encoded, limits: Limits, report: SplitReport) -> Encoded | None:
    """Cut one row and account for it; None where nothing is left to learn from."""
    report.rows += 1
    report.lengths.add(row.prompt, row.answers)
    limit = limits.max_length if limits.max_prompt_length is None else limits.max_prompt_length
    prompt = row.prompt
    if len(prompt) > limit:
        prompt = prompt[-limit:] if limits.truncation_side == "left" else prompt[:limit]
    short = _cut_answers(row, limits.max_length - len(prompt))

    reason = _nothing_left(row.answers, short.answers)
    if reason is not None:
        report.dropped[reason] += 1
        return None
    report.kept += 1
    report.cut_prompts += len(prompt) < len(row.prompt)
    report.cut_prompt_tokens += len(row.prompt) - len(prompt)
    lengths = short.scored_lengths
    for whole, part in zip(row.scored_lengths, lengths, strict=True):
        report.cut_answers += part < whole
        report.cut_answer_tokens += whole - part
    report.prompt_lengths.append(len(prompt))
    report.answer_lengths += lengths
    report.longest_row = max(report.longest_row, len(prompt) + max(map(len, short.answers)))
    return replace(short, prompt=prompt)


def _cut_answers(row: Encoded, room: int) -> Encoded:
    """Cut the answers at their end; of a conversation, what follows its last scored token goes too."""
    if row.scored is None:
        return replace(row, answers=[ids[:room] for ids in row.answers])
    scored = row.scored[:room]
    while scored and not scored[-1]:
        scored.pop()
    return replace(row, answers=[row.answers[0][: len(scored)]], scored=scored)


def _nothing_left(completions: list[Ids], short: list[Ids]) -> str | None:
    """Say why a row has nothing to learn from after cutting: an answer is gone, or the answers are the same."""
    if any(not ids for ids in short):
        return CUT_AWAY if all(completions) else "empty answer"
    if len(short) > 1 and all(ids == short[0] for ids in short[1:]):
        same_before = all(ids == completions[0] for ids in completions[1:])
        return "with equal answers" if same_before else EQUAL_ONCE_CUT
    return None
