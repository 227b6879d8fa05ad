"""Rows into token ids, uncut: where a prompt ends and its answers begin, and which tokens carry the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any

from lora_exp.data.chat import ChatTemplate, RefusedError, Rendered, Span

BATCH = 512
"""Rows that are handed to the tokenizer at a time."""

Ids = list[int]
Offsets = list[tuple[int, int]]
"""For each token where it begins and ends in the text; empty if nobody asked or the tokenizer cannot tell."""


@dataclass(frozen=True)
class Encoded:
    """A row as token ids.

    Args:
        prompt: What comes before the first token that is learned from.
        answers: The rest, for each answer.
        scored: Of a single answer, 1 for each token that carries the loss and 0 for others; None where all do.
        ended: Whether a special token ends each of the assistant's messages, so that a model learns to stop.
    """

    prompt: Ids
    answers: list[Ids]
    scored: list[int] | None = None
    ended: bool = True

    @property
    def scored_lengths(self) -> list[int]:
        """Return how many tokens of each answer carry the loss."""
        return [len(ids) for ids in self.answers] if self.scored is None else [sum(self.scored)]


def encode_rows(
    rows: Sequence[Mapping[str, Any]], answers: tuple[str, ...], tokenizer: Any, chat_template: bool
) -> Iterator[Encoded | RefusedError]:
    """Yield each row's token ids, uncut, or why the template does not take it."""
    template = ChatTemplate(tokenizer, answers) if chat_template else None
    special = frozenset([*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids])
    remaining = iter(rows)
    while batch := list(islice(remaining, BATCH)):
        rendered = [_rendered(row, answers, tokenizer, template) for row in batch]
        texts = [text for each in rendered if isinstance(each, Rendered) for text in (each.prompt, *each.wholes)]
        spans = any(isinstance(each, Rendered) and each.spans for each in rendered)
        encodings = iter(_encode(texts, tokenizer, spans and tokenizer.is_fast, add_special_tokens=not chat_template))
        for each in rendered:
            if isinstance(each, Rendered):
                made = _parted(each, [next(encodings) for _ in (0, *answers)])
                yield made if isinstance(made, RefusedError) else _with_ends(made, special, tokenizer)
            else:
                yield each


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


def _with_ends(row: Encoded, special: frozenset[int], tokenizer: Any) -> Encoded:
    return replace(row, ended=all(_ends(ids, special, tokenizer) for ids in _messages(row)))


def _messages(row: Encoded) -> list[Ids]:
    """Return the tokens that carry the loss, those that follow one another together."""
    if row.scored is None:
        return row.answers
    runs = groupby(zip(row.answers[0], row.scored, strict=True), key=lambda pair: pair[1])
    return [[token for token, _ in run] for scored, run in runs if scored]


def _ends(ids: Ids, special: frozenset[int], tokenizer: Any) -> bool:
    """Whether a special token ends an answer, apart from blanks behind it; TRL asks the same of a template."""
    for token in reversed(ids[-4:]):
        if token in special:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False
