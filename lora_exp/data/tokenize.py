"""Rows into token ids, cut to their limits, with an account of what was cut and dropped.

TRL 1.x has no `max_prompt_length` and cuts without a word; here the prompt is cut first (at its start, unless told
otherwise, so that the words next to the answer stay), then each answer at its end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from lora_exp.data.cache import NO_CACHE, Cache
from lora_exp.data.chat import ChatTemplate, RefusedError, Rendered, Span
from lora_exp.data.lengths import RowLengths
from lora_exp.data.template import Refusals
from lora_exp.data.token_cache import kept_tokens, token_key
from lora_exp.errors import Problem, UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from lora_exp.data.split import Split

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

    def as_dict(self) -> dict[str, Any]:
        """Return the report for `data_report.json`, lengths as min, median and max over what was kept."""
        # asdict makes pairs into the keys of a Counter (Python 3.10, 3.11).
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


@dataclass(frozen=True)
class Encoded:
    """A row as token ids.

    Args:
        prompt: What comes before the first token that is learned from.
        answers: The rest, for each answer.
        scored: Of a single answer, 1 for each token that carries the loss and 0 for others; None where all do.
    """

    prompt: Ids
    answers: list[Ids]
    scored: list[int] | None = None

    @property
    def scored_lengths(self) -> list[int]:
        """Return how many tokens of each answer carry the loss."""
        return [len(ids) for ids in self.answers] if self.scored is None else [sum(self.scored)]

    @property
    def messages(self) -> list[Ids]:
        """Return the tokens that carry the loss, those that follow one another together."""
        if self.scored is None:
            return self.answers
        runs = groupby(zip(self.answers[0], self.scored, strict=True), key=lambda pair: pair[1])
        return [[token for token, _ in run] for scored, run in runs if scored]


def _special_tokens(tokenizer: Any) -> frozenset[int]:
    return frozenset([*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids])


def _ends(ids: Ids, special: frozenset[int], tokenizer: Any) -> bool:
    """Whether a special token ends an answer, apart from blanks behind it; TRL asks the same of a template."""
    for token in reversed(ids[-4:]):
        if token in special:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


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

    report, refusals, special = SplitReport(source, format), Refusals(source, tokenizer), _special_tokens(tokenizer)
    columns: dict[str, list[Any]] = {"row": [], "prompt_ids": [], **{f"{name}_ids": [] for name in answers}}
    masks: list[list[int]] = []
    gaps = False
    for row, encoded in enumerate(_encoded(rows, answers, tokenizer, chat_template)):
        if isinstance(encoded, RefusedError):
            refusals.add(row, encoded)
            continue
        cut = _cut(encoded, limits, report)
        if cut is None:
            continue
        report.unended += not all(_ends(ids, special, tokenizer) for ids in encoded.messages)
        gaps = gaps or cut.scored is not None
        masks.append(cut.scored or [1] * len(cut.answers[0]))
        for column, value in zip(columns.values(), [row, cut.prompt, *cut.answers], strict=True):
            column.append(value)
    if problems := refusals.problems():
        raise UserError(REFUSED, problems)
    return Dataset.from_dict({**columns, f"{answers[0]}_mask": masks} if gaps else columns), report


def _encoded(
    rows: Sequence[Mapping[str, Any]], answers: tuple[str, ...], tokenizer: Any, chat_template: bool
) -> Iterator[Encoded | RefusedError]:
    """Yield each row's token ids, uncut, or why the template does not take it."""
    template = ChatTemplate(tokenizer, answers) if chat_template else None
    remaining = iter(rows)
    while batch := list(islice(remaining, BATCH)):
        rendered = [_rendered(row, answers, tokenizer, template) for row in batch]
        texts = [text for each in rendered if isinstance(each, Rendered) for text in (each.prompt, *each.wholes)]
        spans = any(isinstance(each, Rendered) and each.spans for each in rendered)
        encodings = iter(_encode(texts, tokenizer, spans and tokenizer.is_fast, add_special_tokens=not chat_template))
        for each in rendered:
            yield _parted(each, [next(encodings) for _ in (0, *answers)]) if isinstance(each, Rendered) else each


Offsets = list[tuple[int, int]]
"""For each token where it begins and ends in the text; empty if nobody asked or the tokenizer cannot tell."""


def _encode(texts: list[str], tokenizer: Any, places: bool, add_special_tokens: bool) -> list[tuple[Ids, Offsets]]:
    if not texts:
        return []
    made = tokenizer(texts, add_special_tokens=add_special_tokens, return_offsets_mapping=places)
    offsets = made["offset_mapping"] if places else [[] for _ in texts]
    return list(zip(made["input_ids"], offsets, strict=True))


def _rendered(
    row: Mapping[str, Any], answers: tuple[str, ...], tokenizer: Any, template: ChatTemplate | None
) -> Rendered | RefusedError:
    if template is None:
        return _verbatim(row, answers, tokenizer)
    try:
        return template.render(row)
    except RefusedError as error:
        return error


def _verbatim(row: Mapping[str, Any], answers: tuple[str, ...], tokenizer: Any) -> Rendered:
    """Join prompt and answers; an answer ends with the end token."""
    prompt, end = row["prompt"], tokenizer.eos_token or ""
    return Rendered(prompt, [f"{prompt}{row[name].removesuffix(end)}{end}" for name in answers], [])


def _parted(rendered: Rendered, encodings: Sequence[tuple[Ids, Offsets]]) -> Encoded | RefusedError:
    """Part a row's prompt from its answers, whose texts were tokenised together with it.

    As TRL 1.16 does it, the prompt and prompt+answer are tokenised as wholes and split where they part: tokens
    may merge across the boundary, and a template may render the prompt alone differently. A conversation is split at
    the first token of the assistant's first message.
    """
    (prompt, _), *wholes = encodings
    if not rendered.spans:
        shared = min(_common_prefix_length(prompt, whole) for whole, _ in wholes)
        return Encoded(prompt[:shared], [whole[shared:] for whole, _ in wholes])
    ((whole, offsets),) = wholes
    try:
        mask = _mask(offsets, rendered.spans)
    except RefusedError as error:
        return error
    first = mask.index(1)
    return Encoded(whole[:first], [whole[first:]], None if all(mask[first:]) else mask[first:])


def _mask(offsets: Offsets, spans: Sequence[Span]) -> list[int]:
    """Return 1 for each token of a conversation that belongs to an assistant's message, and 0 for others.

    A token that reaches across the beginning of a message belongs to it, as in an answer that stands alone.

    Raises:
        RefusedError: If a token reaches across the end of a message, or a message has none.
    """
    if not offsets:
        what = "this tokenizer does not tell where its tokens stand, so that the assistant's cannot be told apart"
        raise RefusedError(what, spans[0].place, "token")
    mask = [0] * len(offsets)
    token = 0
    for span in spans:
        while token < len(offsets) and offsets[token][1] <= span.begin:
            token += 1
        first = token
        while token < len(offsets) and offsets[token][0] < span.end:
            token += 1
        if token == first:
            raise RefusedError("the chat template leaves out this message", span.place, "left out")
        if offsets[token - 1][1] > span.end:
            raise RefusedError("a token reaches across the end of this message", span.place, "token")
        mask[first:token] = [1] * (token - first)
    return mask


def _common_prefix_length(first: Ids, second: Ids) -> int:
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


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
        return "answer cut away" if all(completions) else "empty answer"
    if len(short) > 1 and all(ids == short[0] for ids in short[1:]):
        same_before = all(ids == completions[0] for ids in completions[1:])
        return "answers equal" if same_before else "answers equal after cutting"
    return None
