"""The step of methods on rollouts: policy and critic in one forward pass, terms by token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.data.chat import Example
from align.logps import Pack, empty_pack, pack_examples, token_logps, token_logps_and_entropy, token_values
from align.methods.ppo import PPO
from align.spec.online import RolloutStage
from align.training.buffer import RolloutExample
from align.training.step import Reference, Step, Totals
from align.types import LossOutput, Needs, RolloutLogps, Term, checked

CRITIC = "critic"


class RolloutStep(Step):
    """A method on rollouts bound to its settings.

    Examples are prompts with what was drawn for them; a text to mix in (PPO-ptx) is an example without.
    """

    def packs(self, examples: Sequence[Example]) -> Sequence[Pack]:
        """Packs of texts, then packs of completions."""
        drawn = [i for i, e in enumerate(examples) if isinstance(e, RolloutExample)]
        texts = [i for i, e in enumerate(examples) if not isinstance(e, RolloutExample)]
        return [*self._packed(examples, texts), *self._packed(examples, drawn)]

    def _packed(self, examples: Sequence[Example], which: Sequence[int]) -> list[Pack]:
        # The activations of policy and critic live at once: half the tokens in a pack keep memory where it was.
        budget = self.pack_tokens // 2 if Needs.VALUES in self.method.needs else self.pack_tokens
        packs = pack_examples([examples[i] for i in which], budget, packing=self.packing)
        return [replace(pack, examples=tuple(which[i] for i in pack.examples)) for pack in packs]

    def weights(self, examples: Sequence[Example], packs: Iterable[Pack]) -> dict[str, float]:
        """Total weight of each term over these packs; no model is run."""
        totals = Totals()
        for pack in packs:
            zeros = torch.zeros(len(pack.targets))
            own = [examples[i] for i in pack.examples]
            drawn = isinstance(own[0], RolloutExample)
            totals.add((self._loss(own, zeros, zeros, zeros) if drawn else self._text(zeros, pack)).terms)
        return {name: weight for name, (_, weight) in totals.numbers().items()}

    def terms(
        self,
        model: Any,
        pack: Pack,
        examples: Sequence[Example],
        references: Sequence[Reference] | None = None,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> LossOutput:
        """Run policy and critic on one pack and apply the method.

        Args:
            model: The `RoleModel`, as the launcher wrapped it.
            pack: One of `packs(examples)`, on the model's device.
            examples: The examples the pack indexes.
            references: Not read: a rollout brings its own.
            statistics: Not read.
        """
        own = [examples[i] for i in pack.examples]
        if isinstance(own[0], RolloutExample):
            (policy, entropy), values = self._both(model, pack, self._policy, token_values)
            return self._loss(own, policy, entropy, values)
        logps, idle = self._both(model, pack, token_logps, _idle)
        return self._text(logps if idle is None else logps + idle.sum(), pack)

    def touch(self, model: Any, pack: Pack) -> Tensor:
        """A zero that depends on every trained parameter: the loss of an empty pack."""
        logps, values = self._both(model, pack, token_logps, token_values)
        return (logps.sum() + (0.0 if values is None else values.sum())) * 0.0

    @property
    def role(self) -> str:
        """The role that rests."""
        return "policy"

    @property
    def stage(self) -> RolloutStage:
        assert isinstance(self.config, RolloutStage)
        return self.config

    @property
    def _policy(self) -> Any:
        bonus = getattr(self.stage, "entropy_weight", 0.0) > 0
        return partial(token_logps_and_entropy, temperature=self.stage.generation.temperature, bonus=bonus)

    def _both(self, model: Any, pack: Pack, policy: Any, critic: Any) -> tuple[Any, Tensor | None]:
        """What the functions give under policy and critic; None for a method without a critic."""
        if Needs.VALUES not in self.method.needs:
            return model("policy", policy, pack), None
        found, values = model("policy", policy, pack, beside=((CRITIC, critic),))
        return found, values

    def _loss(self, own: Sequence[Any], policy: Tensor, entropy: Tensor, values: Tensor | None) -> LossOutput:
        """The method on [N] numbers of the tokens of these examples."""
        drawn = [e.drawn for e in own]

        def row(name: str) -> Tensor | None:
            parts = [getattr(d, name) for d in drawn]
            return None if parts[0] is None else torch.cat(parts).to(policy.device)

        length = torch.tensor([len(c.ids) for e in own for c in e.completions], device=policy.device)
        kept = torch.tensor([float(k) for d in drawn for k in d.kept], device=policy.device)
        advantages, old = row("advantages"), row("old")
        assert advantages is not None
        batch = RolloutLogps(
            policy=policy,
            old=policy.detach() if old is None else old,
            advantages=advantages,
            owner=torch.repeat_interleave(torch.arange(len(length), device=policy.device), length),
            length=length,
            weight=kept,
            reference=row("reference"),
            entropy=entropy,
            values=values if Needs.VALUES in self.method.needs else None,
            old_values=row("values"),
            returns=row("returns"),
        )
        return checked(self.method.loss(batch, self.config), self.method.kind)

    def _text(self, logps: Tensor, pack: Pack) -> LossOutput:
        """The negative log-likelihood of [N] tokens of texts that are mixed in."""
        assert isinstance(self.config, PPO)
        term = Term(-logps, torch.ones_like(logps), self.config.ptx_weight)
        return LossOutput({"ptx": term}, {"ptx/loss": Term(-logps.detach(), torch.ones_like(logps))})


def _idle(causal_lm: Any, pack: Pack, head: Any) -> Tensor:
    """No value of a text is wanted, but a critic that is left out would leave ranks out of step."""
    return token_values(causal_lm, empty_pack(0).to(pack.input_ids.device), head)
