"""Base classes of the stages that learn from their own samples, and the settings that several of them share."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from align.spec.base import DataRef, PolicyRef, Settings, Unread
from align.spec.scored import Scored
from align.spec.stages import GenerationSettings, PolicyStage


class RolloutStage(PolicyStage, Scored):
    """A stage on completions that its own policy draws: rollout, scores, advantages, updates, and again.

    An example is a prompt with all its completions, so that `train.global_batch_size` counts prompts.
    """

    unread: ClassVar[tuple[Unread, ...]] = (
        Unread(
            "missing_eos_score",
            lambda stage: stage.missing_eos in ("keep", "drop"),
            "a completion without an end keeps its score, or is left out",
            "write `missing_eos: replace` or `subtract`",
        ),
        Unread(
            "weights",
            lambda stage: len(stage.parts) == 1,
            "there is one score, and beta says what it weighs against the KL",
            "remove it, or add `scorers`",
        ),
    )

    prompts: Annotated[str, DataRef(("prompt", "conversation", "pair", "ranked", "samples", "unpaired"))]
    """What is asked; of records with answers the prompts alone."""
    completions: PositiveInt = 4
    """Completions per prompt, k."""
    prompts_per_rollout: PositiveInt = 64
    """Prompts that are answered before the policy is updated; `train.global_batch_size` of them make an update."""
    epochs_per_rollout: PositiveInt = 1
    """How often the completions of a rollout are trained on."""
    generation: GenerationSettings = GenerationSettings()
    """How completions are drawn. Log-probabilities are taken at its temperature everywhere."""
    missing_eos: Literal["replace", "subtract", "drop", "keep"] = "replace"
    """What becomes of a completion that does not end by itself: its score is replaced by `missing_eos_score`, which is
    added to it, or the completion is left out of the loss, or nothing. One of the first two keeps lengths in bounds."""
    missing_eos_score: float = -1.0
    """In units of the sum of scores."""
    score_clip: PositiveFloat | None = None
    """Scores are clipped to plus and minus this."""
    normalise_scores: bool = False
    """Divide scores by the standard deviation of all rollouts so far, after their mean is taken off. A reward model of
    a `reward` stage has a scale of its own already."""
    stop_kl: PositiveFloat | None = None
    """Leave out what remains of a rollout's updates once half the mean squared log-ratio to the policy that drew it
    exceeds this, in nats squared."""

    @model_validator(mode="after")
    def _possible(self) -> RolloutStage:
        if self.generation.temperature == 0:
            raise ValueError("`generation.temperature` is 0: nothing can be learnt from samples that do not vary")
        batch = self.train.global_batch_size
        if self.prompts_per_rollout % batch:
            raise ValueError(
                f"`prompts_per_rollout` is {self.prompts_per_rollout}, which is no multiple of the "
                f"`train.global_batch_size` of {batch} prompts"
            )
        return self

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self.epochs_per_rollout * (self.prompts_per_rollout // self.train.global_batch_size)

    def total_steps(self, prompts: int) -> int:
        """Optimizer steps of the whole run over so many prompts."""
        rollouts = math.ceil((self.train.epochs or 1.0) * prompts / self.prompts_per_rollout)
        return self.train.max_steps or rollouts * self.updates_per_rollout


class Anchored(Settings):
    """Mixed into the stages that may be held close to a reference policy."""

    reference: PolicyRef | None
    """The frozen policy that the KL is taken against: a stage, declared and never guessed; `null` for none."""

    @property
    def pull(self) -> float:
        """The KL coefficient that is in effect."""
        beta: float = getattr(self, "beta", 0.0)
        return 0.0 if self.reference is None else beta


def unanchored(field: str, off: Any = 0.0) -> Unread:
    """A setting of the KL that nothing reads without a reference."""
    return Unread(
        field,
        lambda stage: stage.reference is None and getattr(stage, field) != off,
        "there is no reference to stay close to",
        "name a `reference`, or remove it",
    )


class PenalisedKL(Anchored):
    """Mixed into the stages that take the KL off the reward, token by token."""

    unread: ClassVar[tuple[Unread, ...]] = (
        unanchored("beta"),
        *(
            Unread(
                field,
                lambda stage: stage.pull == 0,
                "no KL is taken off the reward",
                "name a `reference`, and a beta above 0",
            )
            for field in ("kl_estimator", "kl_target")
        ),
        Unread(
            "kl_horizon",
            lambda stage: stage.kl_target is None or stage.pull == 0,
            "beta stays as it is without a `kl_target`",
            "remove it, or give a `kl_target`",
        ),
    )

    beta: NonNegativeFloat = 0.05
    """Weight of the KL in the reward, per nat."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """d, d^2/2 or exp(-d) - 1 + d of the log-ratio d to the reference: k1 and k3 are unbiased, k2 and k3 not negative.
    """
    kl_target: PositiveFloat | None = None
    """KL per completion, in nats, that beta is steered to after every rollout (arXiv:1909.08593, section 2.2)."""
    kl_horizon: PositiveInt = 10_000
    """Completions over which beta follows; smaller is faster."""


class Clipped(Settings):
    """Mixed into the stages that clip the ratio of new to old policy."""

    clip: PositiveFloat = 0.2
    """How far the ratio may be from 1 before its gradient is cut off."""


class EntropyBonus(Settings):
    """Mixed into the stages that can reward entropy."""

    entropy_weight: NonNegativeFloat = 0.0
    """Weight of the mean entropy of a token's distribution, in nats, that is taken off the loss."""
