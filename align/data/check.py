"""From a data entry to examples, with everything that was left out on the way counted and told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from align.data.chat import ChatEncoder, Example, LossOn
from align.data.convert import as_prompt
from align.data.fields import fields_of
from align.data.mismatch import with_mismatched
from align.data.reading import Reading
from align.data.records import (
    BadRow,
    Conversation,
    Dropped,
    Message,
    Pair,
    Prompt,
    Ranked,
    Record,
    Samples,
    Unpaired,
    before_answer,
    digest,
)
from align.data.report import DataReport, contradictions, prompt_group, token_statistics
from align.data.sources import Row, Source
from align.errors import DataError, RecipeError
from align.spec.data import RECORDS_OF_FORMAT, records_of
from align.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORDS_OF_BATCH = {
    Batch.TOKENS: ("text", "conversation"),
    Batch.PAIRED: ("pair",),
    Batch.UNPAIRED: ("unpaired",),
    Batch.RANKED: ("ranked", "pair"),
}
"""Which records a batch kind is made of."""

RECORDS_WITH_PROMPT = ("prompt", "conversation", "pair", "ranked", "samples", "unpaired")

CHUNK = 2048
"""Records that the tokenizer gets at once."""


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt to be answered.

    Attributes:
        row: Number of the row it was made from.
        text: The last user message: what a scorer sees.
        messages: The whole prompt.
        prompt_ids: Token ids, with the template's generation prompt.
        fields: What else its row says, for a verifier.
        answers: What the row itself answers, in one turn each, by name: `chosen`, `completion`, a place in a list.
        target: The best of these; None where there is none, or it has several turns.
    """

    row: int
    text: str
    messages: list[Message]
    prompt_ids: list[int]
    fields: Mapping[str, Any] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)
    target: str | None = None


def load_examples(
    source: Source,
    *,
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    loss_on: LossOn = "completion",
    target: bool = False,
    folder: Path,
    quarantine: Path | None = None,
) -> tuple[list[Example], DataReport]:
    """Examples of a data entry, in the order of its rows.

    Args:
        source: The entry.
        batch: What the method's examples are made of.
        tokenizer: The model's.
        max_tokens: Longest prompt + completion; what is longer is cut.
        loss_on: What is trained in a conversation.
        target: Whether every ranked example ends with its target, and records without one are dropped.
        folder: Where relative paths start.
        quarantine: File that malformed rows are written to; removed if there is none.

    Raises:
        RecipeError: The entry cannot serve this batch kind, or a setting of it has no effect.
        DataError: The source cannot be read, too many rows are malformed, nothing is left, or all prompts are equal
            where another one's completion is needed.
    """
    _expect(source, batch)
    encoder = ChatEncoder(tokenizer, max_tokens, loss_on, target=target and batch is Batch.RANKED)
    reading = Reading(source, folder)
    examples = [example for _, _, example in _encoded(reading, encoder, reading.records())]
    report = _report(reading, encoder, examples, quarantine)
    report.truncated = sum(any(c.truncated for c in e.completions) for e in examples)
    report.candidates = sum(len(e.scores) for e in examples if len(e.scores) > 1)
    report.desirable = sum(e.scores == (1.0,) for e in examples)
    report.contradictions = contradictions(examples)
    if batch is Batch.UNPAIRED:
        examples = with_mismatched(examples, max_tokens)
    return examples, report


def load_prompts(
    source: Source, *, tokenizer: PreTrainedTokenizerBase, max_tokens: int, folder: Path, quarantine: Path | None = None
) -> tuple[list[PromptExample], DataReport]:
    """Prompts of a data entry: of a conversation, everything before its last answer; else what the answers share.

    A conversion of the entry changes nothing of its prompts.

    Args:
        source: The entry.
        tokenizer: The model's.
        max_tokens: Longest prompt; longer ones are dropped.
        folder: Where relative paths start.
        quarantine: File that malformed rows are written to.

    Raises:
        RecipeError: The entry has no prompts, or a setting of it has no effect.
        DataError: The source cannot be read, too many rows are malformed, or nothing is left.
    """
    if RECORDS_OF_FORMAT[source.format] not in RECORDS_WITH_PROMPT:
        raise RecipeError(f"format {source.format} gives no prompts", where="format", fix="choose another format")
    encoder = ChatEncoder(tokenizer, max_tokens)
    reading = Reading(source, folder)
    found = list(_encoded(reading, encoder, reading.records(as_prompt)))
    report = _report(reading, encoder, [example for _, _, example in found], quarantine)
    return [_prompt_example(record, row, example, source) for record, row, example in found], report


def _prompt_example(record: Record, row: Row, example: Example, source: Source) -> PromptExample:
    assert isinstance(record, Prompt)
    messages, target = record.messages, record.target
    return PromptExample(
        row=example.row,
        text=messages[-1]["content"],
        messages=messages,
        prompt_ids=example.prompt_ids,
        fields=fields_of(row, source.columns),
        answers={name: said[0]["content"] for name, said in record.answers if len(said) == 1},
        target=target[0]["content"] if target is not None and len(target) == 1 else None,
    )


def training_texts(source: Source, folder: Path) -> Iterator[str]:
    """Everything that is said in a data entry, to train a tokenizer on.

    Raises:
        RecipeError: A setting of the entry has no effect.
        DataError: The source cannot be read, too many rows are malformed, or nothing is left.
    """
    reading = Reading(source, folder)
    for record, _ in reading.records():
        for messages in _said(record):
            yield from (message["content"] for message in messages)
    reading.finish(None)


def split_validation(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out about `fraction` of the examples, whole prompts at a time, at least one; the order is kept.

    Raises:
        DataError: All examples share one prompt.
    """
    groups: dict[bytes, int] = {}
    for example in examples:
        groups[prompt_group(example)] = groups.get(prompt_group(example), 0) + 1
    if len(groups) < 2:
        raise DataError(
            f"{len(examples)} examples of {len(groups)} prompt cannot be split for validation",
            where="train.validation",
            fix="remove it, or give more data",
        )
    order, wanted = sorted(groups), max(1, round(fraction * len(examples)))
    Random(seed).shuffle(order)
    held: set[bytes] = set()
    count = 0
    for group in order[:-1]:
        if count >= wanted:
            break
        held.add(group)
        count += groups[group]
    train = [example for example in examples if prompt_group(example) not in held]
    return train, [example for example in examples if prompt_group(example) in held]


def shared_prompts(source: Source, others: Mapping[str, Source], folder: Path) -> dict[str, int]:
    """How many records of a data entry begin with a prompt that another entry has as well, by the name of the other.

    A prompt is what comes before the first answer; no tokenizer is needed.

    Raises:
        DataError: A source cannot be read.
    """
    own = _openings(source, folder)
    shared = {}
    for name, other in others.items():
        theirs = set(_openings(other, folder))
        shared[name] = sum(opening in theirs for opening in own)
    return shared


def first_examples(
    source: Source,
    count: int,
    *,
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    loss_on: LossOn = "completion",
    target: bool = False,
    folder: Path,
) -> list[Example]:
    """The first examples of `load_examples`, read no further than needed, whatever the rest is like."""
    _expect(source, batch)
    reading = Reading(source, folder)
    encoder = ChatEncoder(tokenizer, max_tokens, loss_on, target=target and batch is Batch.RANKED)
    examples: list[Example] = []
    for _, _, example in _encoded(reading, encoder, reading.records(), chunk=count):
        examples.append(example)
        # The last one wanted may need the next one of another prompt.
        if len(examples) >= count and (
            batch is not Batch.UNPAIRED or prompt_group(example) != prompt_group(examples[count - 1])
        ):
            break
    if not examples:
        reading.finish(None, left=0)
    return (with_mismatched(examples, max_tokens) if batch is Batch.UNPAIRED else examples)[:count]


def _openings(source: Source, folder: Path) -> list[bytes]:
    return [digest(before_answer(record.prompt)) for record, _ in Reading(source, folder).records()]


def _said(record: Record) -> list[list[Message]]:
    """Everything that is said in a record."""
    if isinstance(record, Conversation | Prompt):
        return [record.messages]
    if isinstance(record, Pair):
        return [record.prompt, record.chosen, record.rejected]
    if isinstance(record, Ranked):
        return [record.prompt, *record.responses]
    if isinstance(record, Samples):
        return [record.prompt, [{"role": "assistant", "content": each} for each in record.responses]]
    return [record.prompt, record.completion] if isinstance(record, Unpaired) else [record.prompt]


def _expect(source: Source, batch: Batch) -> None:
    kind, wanted = records_of(source), RECORDS_OF_BATCH[batch]
    if kind not in wanted:
        converted = f" and convert: {source.convert}" if source.convert else ""
        raise RecipeError(f"format {source.format}{converted} gives {kind} records, not {' or '.join(wanted)} records")


def _encoded(
    reading: Reading, encoder: ChatEncoder, records: Iterator[tuple[Record, Row]], chunk: int = CHUNK
) -> Iterator[tuple[Record, Row, Example]]:
    while part := list(islice(records, chunk)):
        for (record, row), outcome in zip(part, encoder.encode_many([record for record, _ in part]), strict=True):
            if isinstance(outcome, BadRow):
                reading.quarantine(record.row, outcome, row)
            elif isinstance(outcome, Dropped):
                reading.drop(outcome)
            else:
                yield record, row, outcome


def _report(reading: Reading, encoder: ChatEncoder, examples: Sequence[Example], quarantine: Path | None) -> DataReport:
    reading.finish(quarantine, left=len(examples))
    return DataReport(
        rows_read=reading.rows_read,
        records=reading.parsed,
        converted=reading.converted,
        examples=len(examples),
        quarantined=dict(reading.quarantined.most_common()),
        dropped=dict(reading.dropped.most_common()),
        noted=dict((reading.noted + encoder.noted).most_common()),
        prompts=len({prompt_group(example) for example in examples}),
        tokens=token_statistics(examples),
    )
