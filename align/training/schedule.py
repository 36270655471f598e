"""Which examples each optimizer step sees, as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.data import Dataset

from align.spec.online import RolloutStage
from align.spec.train import TrainSettings


@dataclass(frozen=True)
class Schedule:
    """The global batches of a run.

    Every epoch is a permutation drawn from (seed, epoch); a step takes the next `global_batch_size` of it. Neither
    the world size nor what happened before a resume enters, so a step's batch is the same on one process, on many,
    and after a restart.

    Attributes:
        examples: Number of training examples.
        batch: Examples per optimizer step, over all ranks. The last step of an epoch takes what is left.
        total_steps: Optimizer steps of the whole run.
        seed: Seed of the permutations.
    """

    examples: int
    batch: int
    total_steps: int
    seed: int

    @classmethod
    def of(cls, settings: TrainSettings, examples: int) -> Schedule:
        per_epoch = math.ceil(examples / settings.global_batch_size)
        total = settings.max_steps or math.ceil((settings.epochs or 1.0) * per_epoch)
        return cls(examples, settings.global_batch_size, total, settings.seed)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.examples / self.batch)

    def indices(self, step: int) -> list[int]:
        """Indices of the examples of optimizer step `step` (from 0), over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return _permutation(self.examples, self.seed, epoch)[position * self.batch : (position + 1) * self.batch]


@dataclass(frozen=True)
class RolloutSchedule:
    """Which prompts each rollout asks, and which of them each optimizer step learns from.

    A rollout takes the next prompts of the permutations of all epochs, one after the other; a step takes a part of its
    rollout, in an order drawn anew for every pass over it.

    Attributes:
        prompts: Number of prompts.
        size: Prompts per rollout.
        batch: Prompts per optimizer step, over all ranks; divides `size`.
        epochs: Passes over a rollout.
        total_steps: Optimizer steps of the whole run.
        seed: Seed of the permutations.
    """

    prompts: int
    size: int
    batch: int
    epochs: int
    total_steps: int
    seed: int

    @classmethod
    def of(cls, stage: RolloutStage, prompts: int) -> RolloutSchedule:
        size, batch, total = stage.prompts_per_rollout, stage.train.global_batch_size, stage.total_steps(prompts)
        return cls(prompts, size, batch, stage.epochs_per_rollout, total, stage.train.seed)

    @property
    def updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.epochs * (self.size // self.batch)

    def rollout(self, step: int) -> int:
        """The rollout that optimizer step `step` (from 0) learns from."""
        return step // self.updates

    def asked(self, rollout: int) -> list[int]:
        """Indices of the prompts of a rollout."""
        places = range(rollout * self.size, (rollout + 1) * self.size)
        return [_permutation(self.prompts, self.seed, p // self.prompts)[p % self.prompts] for p in places]

    def indices(self, step: int) -> list[int]:
        """Places in the rollout of the prompts that optimizer step `step` learns from, over all ranks."""
        rollout, update = divmod(step, self.updates)
        epoch, part = divmod(update, self.size // self.batch)
        order = _permutation(self.size, self.seed + 1, rollout * self.epochs + epoch)
        return order[part * self.batch : (part + 1) * self.batch]


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator).tolist()


class StepDataset(Dataset):
    """What the Trainer iterates: item `s` is this rank's share of the examples of optimizer step `s`, as indices."""

    def __init__(self, schedule: Schedule | RolloutSchedule, rank: int, world_size: int) -> None:
        self.schedule, self.rank, self.world_size = schedule, rank, world_size

    def __len__(self) -> int:
        return self.schedule.total_steps

    def __getitem__(self, step: int) -> Sequence[int]:
        return self.schedule.indices(step)[self.rank :: self.world_size]
