"""align's examples, in align's order, as the batches that TRL's trainers compute their losses from.

TRL gets a data set of numbers, and this turns numbers into tensors: nothing is tokenised, cut or masked a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from align.data.chat import Example
from align.errors import DataError
from align.training.schedule import RolloutSchedule, Schedule
from align.types import Batch

ROWS = {Batch.TOKENS: 1, Batch.PAIRED: 2, Batch.UNPAIRED: 1, Batch.RANKED: 2}
"""Rows of a forward pass that one example takes."""
IGNORED = -100
"""The label of a token that is not trained."""


class EpochOrder(Sampler[int]):
    """The examples in the order of align's schedule. The Trainer tells it which epoch begins."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.epoch = schedule, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.schedule.examples

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.schedule.steps_per_epoch
        for step in range(first, first + self.schedule.steps_per_epoch):
            yield from self.schedule.indices(step)


class RolloutOrder(Sampler[int]):
    """The prompts of every rollout in the order of align's schedule, each as often as it is completed.

    TRL wants all of a rollout before every forward pass.

    Args:
        schedule: Which prompts a rollout asks.
        completions: Per prompt.
        passes: Forward passes of an optimizer step.
    """

    def __init__(self, schedule: RolloutSchedule, completions: int, passes: int) -> None:
        self.schedule, self.completions, self.passes = schedule, completions, passes

    def __len__(self) -> int:
        return self.schedule.total_steps * self.passes * self.schedule.size * self.completions

    def __iter__(self) -> Iterator[int]:
        for step in range(self.schedule.total_steps):
            asked = self.schedule.asked(self.schedule.rollout(step))
            for _ in range(self.passes):
                yield from (i for i in asked for _ in range(self.completions))


class Feed:
    """Collates numbers of examples into a batch of the trainer of one batch kind, padded on the right.

    Args:
        kind: What an example is made of.
        examples: What the numbers count.
        pad_token_id: Fills rows up; it is masked everywhere.
        margin: By how much a reward model's better one has to win, as `kind: reward` has it.
    """

    def __init__(self, kind: Batch, examples: Sequence[Example], pad_token_id: int, margin: str = "none") -> None:
        self.kind, self.examples, self.pad_token_id, self.margin = kind, examples, pad_token_id, margin

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        examples = [self.examples[row["number"]] for row in rows]
        if self.kind is Batch.TOKENS:
            ids, attention, mask = self._rows(examples, 0)
            return {"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(~mask, IGNORED)}
        if self.kind is Batch.PAIRED:
            return self._named("", examples, 0, 1)
        if self.kind is Batch.RANKED:
            ids, attention, _ = self._rows(examples, 0, 1)
            wanted = {"column": [e.margin for e in examples], "score": [e.scores[0] - e.scores[1] for e in examples]}
            margin = {"margin": torch.tensor(wanted[self.margin])} if self.margin in wanted else {}
            return {"input_ids": ids, "attention_mask": attention, **margin}
        # TRL would pair each prompt with its neighbour's completion in the batch; align says which of the data it is.
        labels = torch.tensor([e.scores[0] > 0 for e in examples])
        return {**self._named("", examples, 0), **self._named("KL_", examples, 1), "label": labels}

    def _named(self, prefix: str, examples: Sequence[Example], *which: int) -> dict[str, Tensor]:
        ids, attention, mask = self._rows(examples, *which)
        return {
            f"{prefix}input_ids": ids,
            f"{prefix}attention_mask": attention,
            f"{prefix}completion_mask": mask.long(),
        }

    def _rows(self, examples: Sequence[Example], *which: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, attention mask and mask of trained tokens of completions `which`: all first ones, then all second."""
        pairs = [(e.prompt_ids, e.completions[k]) for k in which for e in examples]
        return (
            _padded([prompt + c.ids for prompt, c in pairs], self.pad_token_id),
            _padded([[1] * (len(prompt) + len(c.ids)) for prompt, c in pairs], 0),
            _padded([[0] * len(prompt) + list(map(int, c.mask)) for prompt, c in pairs], 0).bool(),
        )


def micro_batch(kind: Batch, examples: Sequence[Example], batch: int, pack_tokens: int) -> int:
    """Examples of one forward pass: the largest divisor of the global batch whose rows fit into `pack_tokens`.

    TRL's KTO estimates its KL term from what is in one forward pass, and align from the whole optimizer step: there it
    is the whole batch, so that both estimate the same and a cosmetic setting changes no result.
    """
    if kind is Batch.UNPAIRED:
        return batch
    longest = max(len(e.prompt_ids) + max(len(c.ids) for c in e.completions) for e in examples)
    return largest_divisor(batch, ROWS[kind] * longest, pack_tokens)


def largest_divisor(batch: int, tokens: int, pack_tokens: int) -> int:
    """The largest divisor of `batch` of which so many examples of so many `tokens` fit into `pack_tokens`, or 1."""
    return max((n for n in range(1, batch + 1) if batch % n == 0 and n * tokens <= pack_tokens), default=1)


def refuse(kind: Batch, examples: Sequence[Example]) -> None:
    """What TRL's trainers cannot be told.

    Raises:
        DataError: A row has another weight than 1, or is no pair where pairs are wanted.
    """
    for example in examples:
        if example.weight != 1.0:
            raise DataError(
                f"row {example.row} has weight {example.weight:g}, and TRL's trainers know no weights",
                fix="leave the column out, or write engine: align",
            )
        if kind is Batch.RANKED and (len(example.scores) != 2 or example.scores[0] <= example.scores[1]):
            raise DataError(
                f"row {example.row} is no pair with the better one first, and TRL's reward trainer knows no other",
                fix="write convert: all_pairs in the data, or engine: align",
            )


def padding_id(kind: Batch, examples: Sequence[Example], pad_token_id: int, vocabulary: int) -> int:
    """The token that rows are filled up with.

    A sequence classifier of transformers takes the last token that is not padding for the end of its row, by the id:
    for a reward model it has to be one that ends no row.
    """
    last = {c.ids[-1] for e in examples for c in e.completions} if kind is Batch.RANKED else set()
    return next(token for token in (pad_token_id, *range(vocabulary)) if token not in last)


def numbers(first: int, count: int, column: str = "number") -> Any:
    """A `datasets.Dataset` of the numbers of `count` examples."""
    from datasets import Dataset

    return Dataset.from_dict({column: list(range(first, first + count))})


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)
