"""What became of the rows of a data entry."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import permutations

import numpy as np
from pydantic import Field, NonNegativeInt

from align.data.chat import Example
from align.spec.base import Settings

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class DataReport(Settings):
    """Counts of one data entry, as one stage reads it.

    Every row is counted once, or once for each record that a conversion made of it:
    ``rows_read + converted = examples + sum(quarantined) + sum(dropped)``.
    """

    rows_read: NonNegativeInt = 0
    """Rows after `skip`, up to `limit`."""
    records: NonNegativeInt = 0
    """Rows that were read as their format, before duplicates and the tokenizer had their say."""
    converted: NonNegativeInt = 0
    """Records that the conversion made of these rows beyond one of each."""
    examples: NonNegativeInt = 0
    """What is trained on, or prompts to be answered."""
    quarantined: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Reason -> malformed rows."""
    dropped: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Rule -> well-formed rows that were left out."""
    noted: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """What was read in another way than it is written -> how often; these rows are used."""
    truncated: NonNegativeInt = 0
    """Examples of which a completion was cut."""
    prompts: NonNegativeInt = 0
    """Different prompts among the examples."""
    candidates: NonNegativeInt = 0
    """Answers of ranked lists, those of pairs included."""
    desirable: NonNegativeInt = 0
    """Unpaired examples with a desirable completion."""
    contradictions: NonNegativeInt = 0
    """Pairs that another pair turns round: the same prompt, chosen there what is rejected here. Two candidates of a
    list are such a pair; of unpaired examples it is the same completion with another label."""
    tokens: dict[str, dict[str, NonNegativeInt]] = Field(default_factory=dict)
    """`prompt`, what follows it (`completion`; `chosen` and `rejected`; `candidate`; `target`), and `total`, with the
    longest of them -> quantiles of the length in tokens."""


def quantiles(lengths: Sequence[int]) -> dict[str, int]:
    """Median, p90, p99 and maximum of lengths; nothing of nothing."""
    if not lengths:
        return {}
    values = np.quantile(lengths, list(QUANTILES.values()), method="higher")
    return dict(zip(QUANTILES, map(int, values), strict=True)) | {"max": max(lengths)}


def token_statistics(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """Quantiles of the lengths of each part of the examples."""
    if not examples:
        return {}
    lengths = {"prompt": [len(e.prompt_ids) for e in examples]}
    if examples[0].completions:
        parts = parts_of(examples)
        for example in examples:
            for name, completion in zip(parts(example), example.completions, strict=True):
                lengths.setdefault(name, []).append(len(completion.ids))
        lengths["total"] = [len(e.prompt_ids) + max(len(c.ids) for c in e.completions) for e in examples]
    return {name: quantiles(each) for name, each in lengths.items()}


def parts_of(examples: Sequence[Example]) -> Callable[[Example], list[str]]:
    """What the completions of each of these examples are called; lists of two are pairs where all lists are."""
    pairs = all(is_pair(example) for example in examples)

    def names(example: Example) -> list[str]:
        count = len(example.scores)
        if count < 2:
            return ["completion", "mismatched"][: len(example.completions)]
        candidates = ["chosen", "rejected"] if pairs else ["candidate"] * count
        return [*candidates, "target"][: len(example.completions)]

    return names


def is_pair(example: Example) -> bool:
    """Whether the candidates are a chosen and a rejected one."""
    return example.scores == (1.0, 0.0)


def prompt_group(example: Example) -> bytes:
    """The same for examples of the same prompt."""
    return example.group or repr(example.prompt_ids).encode()


def contradictions(examples: Sequence[Example]) -> int:
    """Judgements whose reverse is among the examples as well."""
    seen = {judgement for example in examples for judgement in _judgements(example)}
    return sum((prompt, worse, better) in seen for prompt, better, worse in seen)


def _judgements(example: Example) -> Iterator[tuple[bytes, Hashable, Hashable]]:
    """Prompt, better and worse of every two candidates of different score."""
    prompt, scores = prompt_group(example), example.scores
    answers: list[Hashable] = [tuple(c.ids) for c in example.completions[: len(scores)]]
    if len(scores) == 1:
        # A label says that an answer is better, or worse, than none.
        scores, answers = (*scores, 0.5), [*answers, None]
    for a, b in permutations(range(len(scores)), 2):
        if scores[a] > scores[b]:
            yield prompt, answers[a], answers[b]
