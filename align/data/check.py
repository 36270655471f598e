"""From a data entry to examples, with everything that was left out on the way counted and told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from align.data.chat import ChatEncoder, Example, LossOn
from align.data.formats import as_prompt
from align.data.reading import Reading
from align.data.records import BadRow, Dropped, Message, Pair, Prompt, Record, Text, before_answer, digest
from align.data.report import DataReport, contradictions, prompt_group, token_statistics
from align.data.sources import Row, Source
from align.errors import DataError, RecipeError
from align.spec.data import RECORDS_OF_FORMAT
from align.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORDS_OF_BATCH = {Batch.TOKENS: ("text", "conversation"), Batch.PAIRED: ("pair",)}
"""Which records a batch kind is made of."""

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
    """

    row: int
    text: str
    messages: list[Message]
    prompt_ids: list[int]


def load_examples(
    source: Source,
    *,
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    loss_on: LossOn = "completion",
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
        folder: Where relative paths start.
        quarantine: File that malformed rows are written to; removed if there is none.

    Raises:
        RecipeError: The entry cannot serve this batch kind, or a setting of it has no effect.
        DataError: The source cannot be read, too many rows are malformed, or nothing is left.
    """
    _expect(source, RECORDS_OF_BATCH[batch])
    encoder = ChatEncoder(tokenizer, max_tokens, loss_on)
    reading = Reading(source, folder)
    examples = [example for _, example in _encoded(reading, encoder, reading.records())]
    report = _report(reading, encoder, examples, quarantine)
    report.truncated = sum(any(c.truncated for c in e.completions) for e in examples)
    report.contradictions = contradictions(examples)
    return examples, report


def load_prompts(
    source: Source, *, tokenizer: PreTrainedTokenizerBase, max_tokens: int, folder: Path, quarantine: Path | None = None
) -> tuple[list[PromptExample], DataReport]:
    """Prompts of a data entry: of a conversation, everything before its last answer; of a pair, what both share.

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
    _expect(source, ("prompt", "conversation", "pair"))
    encoder = ChatEncoder(tokenizer, max_tokens)
    reading = Reading(source, folder)
    found = list(_encoded(reading, encoder, reading.records(as_prompt)))
    report = _report(reading, encoder, [example for _, example in found], quarantine)
    prompts = []
    for record, example in found:
        assert isinstance(record, Prompt)
        messages = record.messages
        prompts.append(PromptExample(example.row, messages[-1]["content"], messages, example.prompt_ids))
    return prompts, report


def training_texts(source: Source, folder: Path) -> Iterator[str]:
    """Everything that is said in a data entry, to train a tokenizer on.

    Raises:
        RecipeError: A setting of the entry has no effect.
        DataError: The source cannot be read, too many rows are malformed, or nothing is left.
    """
    reading = Reading(source, folder)
    for record, _ in reading.records():
        if isinstance(record, Text):
            yield record.text
        elif isinstance(record, Pair):
            yield from (message["content"] for message in [*record.prompt, *record.chosen, *record.rejected])
        else:
            yield from (message["content"] for message in record.messages)
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
    folder: Path,
) -> list[Example]:
    """The first examples of `load_examples`, read no further than needed, whatever the rest is like."""
    _expect(source, RECORDS_OF_BATCH[batch])
    reading = Reading(source, folder)
    encoded = _encoded(reading, ChatEncoder(tokenizer, max_tokens, loss_on), reading.records(), chunk=count)
    examples = [example for _, example in islice(encoded, count)]
    if not examples:
        reading.finish(None, left=0)
    return examples


def _openings(source: Source, folder: Path) -> list[bytes]:
    return [digest(before_answer(record.prompt)) for record, _ in Reading(source, folder).records()]


def _expect(source: Source, records: tuple[str, ...]) -> None:
    kind = RECORDS_OF_FORMAT[source.format]
    if kind not in records:
        raise RecipeError(f"format {source.format} gives {kind}s, not {' or '.join(f'{r}s' for r in records)}")


def _encoded(
    reading: Reading, encoder: ChatEncoder, records: Iterator[tuple[Record, Row]], chunk: int = CHUNK
) -> Iterator[tuple[Record, Example]]:
    while part := list(islice(records, chunk)):
        for (record, row), outcome in zip(part, encoder.encode_many([record for record, _ in part]), strict=True):
            if isinstance(outcome, BadRow):
                reading.quarantine(record.row, outcome, row)
            elif isinstance(outcome, Dropped):
                reading.drop(outcome)
            else:
                yield record, outcome


def _report(reading: Reading, encoder: ChatEncoder, examples: Sequence[Example], quarantine: Path | None) -> DataReport:
    reading.finish(quarantine, left=len(examples))
    return DataReport(
        rows_read=reading.rows_read,
        records=reading.parsed,
        examples=len(examples),
        quarantined=dict(reading.quarantined.most_common()),
        dropped=dict(reading.dropped.most_common()),
        noted=dict((reading.noted + encoder.noted).most_common()),
        prompts=len({prompt_group(example) for example in examples}),
        tokens=token_statistics(examples),
    )
