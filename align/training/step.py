"""From examples to terms: the only place that knows packs, roles and exact reduction at once.

The loss of an optimizer step is  sum_terms coefficient * (sum of sums) / (sum of weights)  over all packs and all
ranks. The weights have to be known before the first backward pass; as they depend on lengths and data alone, they are
found by calling the method once on zero log-probabilities.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.data.chat import Example
from align.logps import Pack, empty_pack, pack_examples, token_logps
from align.methods import Method
from align.spec.stages import TrainedStage
from align.types import Batch, Logps, LossOutput, PairedLogps, Term, TokensLogps

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
    """

    method: Method
    config: TrainedStage
    pack_tokens: int

    def packs(self, examples: Sequence[Example]) -> list[Pack]:
        return pack_examples(examples, self.pack_tokens)

    def empty(self) -> Pack:
        return empty_pack(0)

    def weights(self, examples: Sequence[Example], packs: Iterable[Pack]) -> dict[str, float]:
        """Total weight of each term over these packs; no model is run."""
        totals = Totals()
        for pack in packs:
            lengths = pack.lengths()
            logps = Logps(torch.zeros_like(lengths), lengths)
            zeros = [[0.0] * self.method.batch.completions] * len(examples)
            totals.add(self._apply(logps, pack, examples, zeros).terms)
        return {name: weight for name, (_, weight) in totals.numbers().items()}

    def terms(
        self, model: Any, pack: Pack, examples: Sequence[Example], references: Sequence[Reference] | None
    ) -> LossOutput:
        """Run the policy on one pack and apply the method.

        Args:
            model: The `RoleModel`, as the launcher wrapped it.
            pack: One of `packs(examples)`, on the model's device.
            examples: The examples the pack indexes.
            references: Log-probabilities under the reference, per example, if the method reads them.
        """
        return self._apply(pack.sum_by_completion(model("policy", token_logps, pack)), pack, examples, references)

    def touch(self, model: Any, pack: Pack) -> Tensor:
        """A zero that depends on every trained parameter: the loss of an empty pack."""
        return model("policy", token_logps, pack).sum() * 0.0

    def _apply(
        self, logps: Logps, pack: Pack, examples: Sequence[Example], references: Sequence[Reference] | None
    ) -> LossOutput:
        chosen = [examples[i] for i in pack.examples]
        device = logps.total.device
        weight = torch.tensor([e.weight for e in chosen], dtype=torch.float32, device=device)
        if self.method.batch is Batch.TOKENS:
            return self.method.loss(TokensLogps(logps, weight), self.config)
        reference = None
        if self.method.reference:
            assert references is not None
            flat = [value for i in pack.examples for value in references[i]]
            totals = torch.tensor(flat, dtype=torch.float32, device=device)
            reference = _pairs(Logps(totals, logps.length), weight)
        return self.method.loss(_pairs(logps, weight, reference), self.config)


def _pairs(logps: Logps, weight: Tensor, reference: PairedLogps | None = None) -> PairedLogps:
    """[2B] completions, chosen first in each example, to a batch of B pairs."""
    chosen, rejected = (Logps(logps.total[k::2], logps.length[k::2]) for k in (0, 1))
    return PairedLogps(chosen, rejected, weight, reference)


def scaled_loss(output: LossOutput, weights: dict[str, float]) -> Tensor:
    """This pack's share of the step's loss: each term over the weight of the whole step."""
    shares = [t.coefficient * t.sum.sum() / max(weights[name], 1e-30) for name, t in output.terms.items()]
    return torch.stack(shares).sum()
