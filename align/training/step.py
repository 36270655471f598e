"""From examples to terms: the only place that knows packs, roles and exact reduction at once.

The loss of an optimizer step is  sum_terms coefficient * (sum of sums) / (sum of weights)  over all packs and all
ranks. The weights have to be known before the first backward pass; as they depend on lengths and data alone, they are
found by calling the method once on zero log-probabilities.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from align.data.chat import Example
from align.logps import Pack, Packing, empty_pack, last_rewards, pack_examples, token_logps
from align.methods import Method
from align.spec.stages import TrainedStage
from align.training.batches import batch_of, rewards_of
from align.types import Batch, Logps, LossOutput, Needs, Term, checked

Reference = Sequence[float]
"""Log-probabilities of an example's completions under the reference, in nats."""


class Totals:
    """Sums and weights of terms and metrics, added up over packs.

    Kept as fp64 tensors on the model's device: nothing here waits for a GPU until `numbers` is asked.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Term]) -> None:
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0) + term.sum.detach().double().sum()
            self._weights[name] = self._weights.get(name, 0) + term.weight.double().sum()

    def merge(self, other: Totals) -> None:
        for name in other._sums:
            self._sums[name] = self._sums.get(name, 0) + other._sums[name]
            self._weights[name] = self._weights.get(name, 0) + other._weights[name]

    def numbers(self) -> dict[str, tuple[float, float]]:
        """name -> (sum, weight)."""
        return {name: (float(self._sums[name]), float(self._weights[name])) for name in self._sums}


def pooled_means(parts: Iterable[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Means over several `Totals.numbers()`; a name without weight is left out."""
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, (total, weight) in part.items():
            sums[name] += total
            weights[name] += weight
    return {name: sums[name] / weights[name] for name in sums if weights[name] > 0}


@dataclass(frozen=True)
class Step:
    """A method bound to its settings, able to turn packs into terms.

    Attributes:
        method: The method.
        config: Its settings.
        pack_tokens: Token budget of one forward pass.
        packing: How sequences are laid out; `choose_packing` says what the model can.
    """

    method: Method
    config: TrainedStage
    pack_tokens: int
    packing: Packing = "rows"

    def packs(self, examples: Sequence[Example]) -> Sequence[Pack]:
        """Packs of the completions that are trained."""
        own = [replace(e, completions=e.completions[self._own]) for e in examples]
        return pack_examples(own, self.pack_tokens, packing=self.packing, score_prompts=self.scores_prompts)

    def mismatched(self, examples: Sequence[Example]) -> Sequence[Pack]:
        """Packs of the completions that the method's statistic is taken from; none for a method without one."""
        if self.method.statistic is None:
            return []
        other = [replace(e, completions=e.completions[self._other]) for e in examples]
        return pack_examples(other, self.pack_tokens, packing=self.packing)

    @property
    def scores_prompts(self) -> bool:
        """Whether the prompts' own tokens are scored too."""
        return Needs.PROMPT_LOGPS in self.method.needs and getattr(self.config, "loss_on", "") == "all"

    def empty(self) -> Pack:
        return empty_pack(0)

    def weights(self, examples: Sequence[Example], packs: Iterable[Pack]) -> dict[str, float]:
        """Total weight of each term over these packs; no model is run."""
        totals = Totals()
        references = [[0.0] * len(e.completions) for e in examples] if self.method.reference else None
        for pack in packs:
            zeros = torch.zeros(len(pack.targets) if self._reads_logps else pack.completions)
            totals.add(self._apply(zeros, pack, examples, references, _Zeros()).terms)
        return {name: weight for name, (_, weight) in totals.numbers().items()}

    def statistics(
        self, model: Any, pack: Pack, examples: Sequence[Example], references: Sequence[Reference] | None
    ) -> dict[str, Term]:
        """This pack's part of the method's statistic, from another prompt's completions; run without gradient.

        Args:
            model: The `RoleModel`, as the launcher wrapped it.
            pack: One of `mismatched(examples)`, on the model's device.
            examples: Those examples.
            references: Log-probabilities under the reference, per example, of all its completions.
        """
        assert self.method.statistic is not None
        logps = pack.sum_by_completion(model(self.role, token_logps, pack))
        frozen = self._frozen(pack, references, self._other, logps)
        batch = batch_of(self.method.batch, [examples[i] for i in pack.examples], logps, reference=frozen)
        return self.method.statistic(batch, self.config)

    def terms(
        self,
        model: Any,
        pack: Pack,
        examples: Sequence[Example],
        references: Sequence[Reference] | None,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> LossOutput:
        """Run the policy on one pack and apply the method.

        Args:
            model: The `RoleModel`, as the launcher wrapped it.
            pack: One of `packs(examples)`, on the model's device.
            examples: The examples the pack indexes.
            references: Log-probabilities under the reference, per example, if the method reads them.
            statistics: What the method's statistic came to over the whole step.
        """
        return self._apply(self._run(model, pack), pack, examples, references, statistics or {})

    def touch(self, model: Any, pack: Pack) -> Tensor:
        """A zero that depends on every trained parameter: the loss of an empty pack."""
        return self._run(model, pack).sum() * 0.0

    @property
    def role(self) -> str:
        """The trained role."""
        return "policy" if self._reads_logps else "reward"

    @property
    def _reads_logps(self) -> bool:
        return Needs.REWARDS not in self.method.needs

    @property
    def _own(self) -> slice:
        return slice(0, 1) if self.method.batch is Batch.UNPAIRED else slice(None)

    @property
    def _other(self) -> slice:
        return slice(1, 2)

    def _run(self, model: Any, pack: Pack) -> Tensor:
        return model(self.role, token_logps if self._reads_logps else last_rewards, pack)

    def _apply(
        self,
        values: Tensor,
        pack: Pack,
        examples: Sequence[Example],
        references: Sequence[Reference] | None,
        statistics: Mapping[str, Tensor],
    ) -> LossOutput:
        """The method on [N] log-probabilities of trained tokens, or on [C] rewards."""
        own = [examples[i] for i in pack.examples]
        if not self._reads_logps:
            return checked(self.method.loss(rewards_of(own, values), self.config), self.method.kind)
        logps = pack.sum_by_completion(values)
        batch = batch_of(
            self.method.batch,
            own,
            logps,
            reference=self._frozen(pack, references, self._own, logps),
            prompt=pack.sum_by_prompt(values) if self.scores_prompts else None,
            statistics=statistics,
        )
        return checked(self.method.loss(batch, self.config), self.method.kind)

    def _frozen(self, pack: Pack, references: Sequence[Reference] | None, which: slice, logps: Logps) -> Logps | None:
        """The reference's log-probabilities of the completions of a pack, [C]."""
        if references is None:
            return None
        flat = [value for i in pack.examples for value in references[i][which]]
        return Logps(torch.tensor(flat, dtype=torch.float32, device=logps.total.device), logps.length)


class _Zeros(dict[str, Tensor]):
    """Statistics before there are any: weights do not depend on them."""

    def __missing__(self, name: str) -> Tensor:
        return torch.zeros(())


def scaled_loss(output: LossOutput, weights: dict[str, float]) -> Tensor:
    """This pack's share of the step's loss: each term over the weight of the whole step."""
    shares = [t.coefficient * t.sum.sum() / max(weights[name], 1e-30) for name, t in output.terms.items()]
    return torch.stack(shares).sum()
