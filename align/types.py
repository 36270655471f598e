"""What a method sees and what it returns. Shape letters: B examples, K candidates, T tokens, N units of a term.

A method is a pure function ``(logps, config) -> LossOutput``. It receives log-probabilities that are already summed
over the completion mask, in fp32, and returns *terms*: sums and weights, never a mean. The step divides by the weight
of the whole optimizer step, over all packs and ranks, so the loss does not depend on how examples were packed or
spread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from align.errors import TrainingError


class Batch(StrEnum):
    """What one example of a method is made of. A new batch kind is a design change; a new loss never is."""

    TOKENS = "tokens"
    """One sequence with a mask of trained tokens."""
    PAIRED = "paired"
    """One prompt, a chosen and a rejected completion."""
    UNPAIRED = "unpaired"
    """One prompt, one completion and whether it is desirable; beside it another prompt's completion."""
    RANKED = "ranked"
    """One prompt and k >= 2 candidates with scores, maybe a target to stay close to."""
    ROLLOUT = "rollout"
    """One prompt and k completions that the policy itself has drawn, with what was found out about them since."""


class Needs(StrEnum):
    """What a method asks the engine to compute."""

    LOGPS = "logps"
    """Log-probabilities of the trained tokens, summed by completion."""
    PROMPT_LOGPS = "prompt_logps"
    """Those of the prompt's own tokens besides, where the settings say `loss_on: all`."""
    REWARDS = "rewards"
    """One number per completion, from a scalar head on the state of its last token."""
    TOKEN_LOGPS = "token_logps"  # noqa: S105
    """Log-probabilities of the trained tokens one by one, at the temperature that they were drawn with."""
    VALUES = "values"
    """One number per trained token, from the critic's scalar head on the state that the token was drawn from."""


@dataclass(frozen=True)
class Logps:
    """Log-probabilities of B completions.

    Attributes:
        total: [B] sum of the log-probabilities of the trained tokens, in nats, fp32.
        length: [B] number of trained tokens.
    """

    total: Tensor
    length: Tensor

    @property
    def mean(self) -> Tensor:
        """[B] nats per token."""
        return self.total / self.length.clamp(min=1)

    def detach(self) -> Logps:
        return Logps(self.total.detach(), self.length)


@dataclass(frozen=True)
class TokensLogps:
    """A TOKENS batch: `policy` [B] and the row weights [B]."""

    policy: Logps
    weight: Tensor


@dataclass(frozen=True)
class PairedLogps:
    """A PAIRED batch: chosen and rejected share their prompt token by token.

    Attributes:
        chosen: Policy log-probabilities of the preferred completions, [B].
        rejected: The same for the dispreferred ones, [B].
        weight: [B] weight of each pair (1 unless the data says otherwise).
        reference: The reference model's log-probabilities of the same pairs, without gradient; None for a method that
            declared ``reference=False``, and where the recipe says `reference: null`.
        prompt: Policy log-probabilities of the prompts' own tokens, [B]; None unless the method needs them.
    """

    chosen: Logps
    rejected: Logps
    weight: Tensor
    reference: PairedLogps | None = None
    prompt: Logps | None = None


@dataclass(frozen=True)
class UnpairedLogps:
    """An UNPAIRED batch.

    Attributes:
        policy: Policy log-probabilities of the completions, [B]. What the method's statistic is given are those of
            the mismatched completions instead.
        label: [B] 1 for a desirable completion, 0 for an undesirable one.
        weight: [B] weight of each row.
        reference: The reference's log-probabilities of the same completions, without gradient.
        statistics: What the method's statistic came to over the whole optimizer step, by name, scalars without
            gradient.
    """

    policy: Logps
    label: Tensor
    weight: Tensor
    reference: Logps | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RankedLogps:
    """A RANKED batch: the candidates of B prompts, C in all, those of a prompt one after the other.

    Attributes:
        candidates: Policy log-probabilities of the candidates, [C].
        scores: [C] how good each is; only the order within a prompt means something, equal scores are ties.
        prompt: [C] which of the B prompts each candidate answers, ascending.
        weight: [B] weight of each prompt.
        prompt_length: [B] tokens of each prompt.
        target: Policy log-probabilities of the completion to stay close to, [B]; None where the data has none.
    """

    candidates: Logps
    scores: Tensor
    prompt: Tensor
    weight: Tensor
    prompt_length: Tensor
    target: Logps | None = None


@dataclass(frozen=True)
class RankedRewards:
    """A RANKED batch of a method that needs REWARDS.

    Attributes:
        rewards: [C] outputs of the scalar head, fp32.
        scores: [C] how good each candidate is, as in `RankedLogps`.
        prompt: [C] which of the B prompts each candidate answers, ascending.
        weight: [B] weight of each prompt.
        margin: [B] by how much the better of a pair is better, where the data says so; 0 elsewhere.
    """

    rewards: Tensor
    scores: Tensor
    prompt: Tensor
    weight: Tensor
    margin: Tensor


@dataclass(frozen=True)
class Rollout:
    """What the policy drew and what came of it, over the whole rollout and all ranks: what advantages are made from.

    Tokens stand one after the other, completion after completion, prompt after prompt. Everything is on the CPU.

    Attributes:
        scores: [C] what each completion is worth, fp32.
        prompt: [C] which of the prompts each completion answers, ascending.
        length: [C] tokens of each completion, its EOS included.
        kept: [C] whether each completion takes part in the loss.
        logps: [N] log-probability of each token under the policy that drew it; None unless somebody asks for them.
        reference: [N] the same under the reference; None for a stage without one.
        values: [N] what the critic said in the state each token was drawn from; None without a critic.
        beta: KL coefficient of this rollout.
    """

    scores: Tensor
    prompt: Tensor
    length: Tensor
    kept: Tensor
    logps: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    beta: float = 0.0

    @property
    def owner(self) -> Tensor:
        """[N] the completion of each token."""
        return torch.repeat_interleave(torch.arange(len(self.length)), self.length)

    @property
    def last(self) -> Tensor:
        """[C] index into N of each completion's last token."""
        return self.length.cumsum(0) - 1

    @property
    def kept_tokens(self) -> Tensor:
        """[N] whether each token takes part in the loss."""
        return self.kept[self.owner]


@dataclass(frozen=True)
class Advantages:
    """What a method makes of a rollout.

    Attributes:
        advantages: [N] of every token.
        returns: [N] what the critic shall learn to say; None for a method without one.
    """

    advantages: Tensor
    returns: Tensor | None = None


@dataclass(frozen=True)
class RolloutLogps:
    """A ROLLOUT batch: the tokens of C completions of B prompts, completion after completion.

    Attributes:
        policy: [N] log-probabilities under the policy, in nats, with gradient.
        old: [N] the same under the policy that drew the tokens.
        advantages: [N] of every token.
        owner: [N] the completion of each token, ascending.
        length: [C] tokens of each completion.
        weight: [C] weight of each completion: 0 for one that is left out of the loss.
        reference: [N] log-probabilities under the reference; None for a stage without one.
        entropy: [N] of the policy's distribution in the state each token was drawn from, in nats; with gradient where
            the settings have an `entropy_weight`.
        values: [N] what the critic says, with gradient; None for a method without one.
        old_values: [N] what it said when the tokens were drawn.
        returns: [N] what it should have said.
    """

    policy: Tensor
    old: Tensor
    advantages: Tensor
    owner: Tensor
    length: Tensor
    weight: Tensor
    reference: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None

    @property
    def token_weight(self) -> Tensor:
        """[N] the weight of each token's completion."""
        return self.weight[self.owner]

    def by_completion(self, values: Tensor) -> Tensor:
        """[C] sums of `values` [N]."""
        return torch.zeros_like(self.weight).index_add(0, self.owner, values)


@dataclass(frozen=True)
class Term:
    """One summand of a loss: ``coefficient * sum(sum) / sum(weight)`` over the whole optimizer step.

    Attributes:
        sum: [N] numerators, one per unit (example, pair or token).
        weight: [N] denominators. They may depend on lengths and data, never on log-probabilities: the step needs the
            total before the first backward.
        coefficient: Factor of the term in the loss.
    """

    sum: Tensor
    weight: Tensor
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        if self.sum.ndim != 1:
            has = f"{self.sum.ndim} axes" if self.sum.ndim else "no axis"
            raise ValueError(
                f"Term.sum has {has}: return one value per unit and its weight, never a mean; the step divides"
            )
        if self.sum.shape != self.weight.shape:
            raise ValueError(f"Term.sum {tuple(self.sum.shape)} and Term.weight {tuple(self.weight.shape)} differ")

    @property
    def value(self) -> Tensor:
        """The term over these units alone, as a scalar."""
        return self.coefficient * self.sum.sum() / self.weight.sum().clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class LossOutput:
    """What a method returns.

    Attributes:
        terms: The summands of the loss by name.
        metrics: Detached quantities to log, as terms of their own units (``sum / weight`` is what is logged).
    """

    terms: dict[str, Term]
    metrics: dict[str, Term] = field(default_factory=dict)

    @classmethod
    def of_examples(
        cls, loss: Tensor, *, weight: Tensor | None = None, metrics: dict[str, Tensor] | None = None
    ) -> LossOutput:
        """A loss with one value per example, averaged over examples.

        Args:
            loss: [B] loss of each example.
            weight: [B] weight of each example; 1 if absent.
            metrics: name -> [B] values, averaged with weight 1.

        Raises:
            ValueError: The loss is not one value per example.
        """
        if weight is not None and loss.shape != weight.shape:
            raise ValueError(
                f"the loss has shape {tuple(loss.shape)}, its weight {tuple(weight.shape)}: return one value per "
                "example, never a mean; the step divides"
            )
        weight = torch.ones_like(loss) if weight is None else weight.to(loss.dtype)
        return cls({"loss": Term(loss * weight, weight)}, example_metrics(metrics or {}))

    @property
    def loss(self) -> Tensor:
        """The loss of this batch taken alone."""
        return torch.stack([term.value for term in self.terms.values()]).sum()


def checked(output: Any, kind: str) -> LossOutput:
    """What the loss of that kind returned, if it is something to train on.

    Raises:
        TrainingError: It is no `LossOutput`, or has no terms.
    """
    fix = "return LossOutput.of_examples(loss, weight=...), or LossOutput({name: Term(...)})"
    if not isinstance(output, LossOutput):
        raise TrainingError(f"the loss of `{kind}` returned a {type(output).__name__}, not a LossOutput", fix=fix)
    if not output.terms:
        raise TrainingError(f"the loss of `{kind}` returned no terms", fix=fix)
    return output


def example_metrics(values: dict[str, Tensor]) -> dict[str, Term]:
    """Turn [B] values into metrics that are averaged over examples."""
    return {name: Term(v.detach().float(), torch.ones_like(v, dtype=torch.float32)) for name, v in values.items()}


def map_logps(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to every tensor of a (nested) logps dataclass and build it anew."""
    if isinstance(batch, Tensor):
        return function(batch)
    if batch is None or isinstance(batch, Mapping):  # statistics belong to the whole step, not to rows
        return batch
    return type(batch)(**{f.name: map_logps(getattr(batch, f.name), function) for f in fields(batch)})
