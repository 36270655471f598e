"""What became of the rows of a data entry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field, NonNegativeInt

from align.data.chat import Example
from align.spec.base import Settings

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class DataReport(Settings):
    """Counts of one data entry, as one stage reads it.

    Every row is counted once: ``rows_read = examples + sum(quarantined) + sum(dropped)``.
    """

    rows_read: NonNegativeInt = 0
    """Rows after `skip`, up to `limit`."""
    records: NonNegativeInt = 0
    """Rows that were read as their format, before duplicates and the tokenizer had their say."""
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
    contradictions: NonNegativeInt = 0
    """Pairs that another pair turns round: the same prompt, chosen there what is rejected here."""
    tokens: dict[str, dict[str, NonNegativeInt]] = Field(default_factory=dict)
    """`prompt`, `completion` or `chosen` and `rejected`, and `total` -> quantiles of the length in tokens."""


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
    names = {0: (), 1: ("completion",), 2: ("chosen", "rejected")}[len(examples[0].completions)]
    lengths = {"prompt": [len(e.prompt_ids) for e in examples]}
    lengths |= {name: [len(e.completions[k].ids) for e in examples] for k, name in enumerate(names)}
    if names:
        lengths["total"] = [len(e.prompt_ids) + max(len(c.ids) for c in e.completions) for e in examples]
    return {name: quantiles(each) for name, each in lengths.items()}


def prompt_group(example: Example) -> bytes:
    """The same for examples of the same prompt."""
    return example.group or repr(example.prompt_ids).encode()


def contradictions(examples: Sequence[Example]) -> int:
    """Pairs whose reverse is among the examples as well."""
    seen = {
        (prompt_group(e), tuple(e.completions[0].ids), tuple(e.completions[1].ids))
        for e in examples
        if len(e.completions) == 2
    }
    return sum((prompt, rejected, chosen) in seen for prompt, chosen, rejected in seen)
