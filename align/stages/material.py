"""What a stage trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.data import DataReport, Example, PromptExample


@dataclass(frozen=True)
class Material:
    """The same on every rank.

    Attributes:
        tokenizer: The model's.
        examples: To train on; the texts to mix in for a stage on rollouts.
        validation: Held out.
        reports: Data name -> what was read, dropped and quarantined.
        prompts: What a stage on rollouts asks.
    """

    tokenizer: Any
    examples: list[Example]
    validation: Sequence[Example]
    reports: dict[str, DataReport]
    prompts: Sequence[PromptExample] = ()
