"""The step of methods on rollouts: policy and critic in one forward pass, terms by token.

Their activations live at once, so a pack of both has half the tokens. An example that is larger than that is taken
twice, for one role at a time, and no pack keeps more than one of `pack_tokens` keeps elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
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

POLICY, CRITIC = "policy", "critic"
Said = tuple[tuple[Tensor, Tensor], Tensor | None]
"""[N] log-probabilities and entropies of a pack's tokens under the policy, and their values; None without a critic."""
OF_CRITIC = "value/"
"""How names of metrics of the critic begin."""


@dataclass(frozen=True)
class OneRole(Pack):
    """A pack that one of two trained roles is trained on.

    Attributes:
        role: Which.
    """

    role: str = POLICY

    @classmethod
    def of(cls, pack: Pack, role: str) -> OneRole:
        """The same pack under one role."""
        return cls(**{f.name: getattr(pack, f.name) for f in fields(pack)}, role=role)


@dataclass(frozen=True)
class RolloutStep(Step):
    """A method on rollouts bound to its settings.

    Examples are prompts with what was drawn for them; a text to mix in (PPO-ptx) is an example without.

    Attributes:
        said: What `run` gave for the only pack of this step already, its graph included.
    """

    said: Said | None = None

    def packs(self, examples: Sequence[Example]) -> Sequence[Pack]:
        """Packs of texts, then packs of completions."""
        drawn = [i for i, e in enumerate(examples) if isinstance(e, RolloutExample)]
        texts = [i for i, e in enumerate(examples) if not isinstance(e, RolloutExample)]
        return [*self._packed(examples, texts), *self._packed(examples, drawn)]

    def _packed(self, examples: Sequence[Example], which: Sequence[int]) -> list[Pack]:
        half = self.pack_tokens // 2 if self._has_critic else self.pack_tokens
        packs = pack_examples([examples[i] for i in which], half, packing=self.packing)
        own = [replace(pack, examples=tuple(which[i] for i in pack.examples)) for pack in packs]
        return [each for pack in own for each in self._taken(pack, half, examples)]

    def _taken(self, pack: Pack, half: int, examples: Sequence[Example]) -> list[Pack]:
        """The pack as it is, or once for each role where both at once would keep too much."""
        drawn = isinstance(examples[pack.examples[0]], RolloutExample)
        if not self._has_critic or not drawn or pack.tokens <= half:
            return [pack]
        return [OneRole.of(pack, role) for role in (POLICY, CRITIC)]

    def weights(self, examples: Sequence[Example], packs: Iterable[Pack]) -> dict[str, float]:
        """Total weight of each term over these packs; no model is run."""
        totals = Totals()
        for pack in packs:
            if isinstance(pack, OneRole) and pack.role == CRITIC:
                continue  # the same tokens once more
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
        if isinstance(pack, OneRole):
            return self._one_role(model, pack, own)
        if isinstance(own[0], RolloutExample):
            (policy, entropy), values = self.said or self.run(model, pack)
            return self._loss(own, policy, entropy, values)
        logps, idle = self._both(model, pack, token_logps, _idle)
        return self._text(logps if idle is None else logps + idle.sum(), pack)

    def run(self, model: Any, pack: Pack) -> Said:
        """What policy and critic say of a pack of completions, with a graph."""
        return self._both(model, pack, self._policy, token_values)

    def _one_role(self, model: Any, pack: OneRole, own: Sequence[Any]) -> LossOutput:
        """The terms that depend on one role; for the other stands what it said at the rollout.

        So a method with a critic may have no term that depends on both.
        """
        if pack.role == POLICY:
            (policy, entropy), idle = self._both(model, pack, self._policy, _idle)
            assert idle is not None
            output = self._loss(own, policy + idle.sum() * 0.0, entropy, _row(own, "values", policy.device))
        else:
            idle, values = self._both(model, pack, _idle_policy, token_values)
            assert values is not None
            old = _row(own, "old", values.device)
            output = self._loss(own, old, torch.zeros_like(values), values + idle.sum() * 0.0)
        terms = {name: term for name, term in output.terms.items() if term.sum.requires_grad}
        of_critic = pack.role == CRITIC
        metrics = {name: term for name, term in output.metrics.items() if name.startswith(OF_CRITIC) == of_critic}
        return LossOutput(terms, metrics)

    def touch(self, model: Any, pack: Pack) -> Tensor:
        """A zero that depends on every trained parameter: the loss of an empty pack."""
        logps, values = self._both(model, pack, token_logps, token_values)
        return (logps.sum() + (0.0 if values is None else values.sum())) * 0.0

    @property
    def role(self) -> str:
        """The role that rests."""
        return POLICY

    @property
    def stage(self) -> RolloutStage:
        assert isinstance(self.config, RolloutStage)
        return self.config

    @property
    def _has_critic(self) -> bool:
        return Needs.VALUES in self.method.needs

    @property
    def _policy(self) -> Any:
        bonus = getattr(self.stage, "entropy_weight", 0.0) > 0
        return partial(token_logps_and_entropy, temperature=self.stage.generation.temperature, bonus=bonus)

    def _both(self, model: Any, pack: Pack, policy: Any, critic: Any) -> tuple[Any, Tensor | None]:
        """What the functions give under policy and critic; None for a method without a critic."""
        if not self._has_critic:
            return model(POLICY, policy, pack), None
        found, values = model(POLICY, policy, pack, beside=((CRITIC, critic),))
        return found, values

    def _loss(self, own: Sequence[Any], policy: Tensor, entropy: Tensor, values: Tensor | None) -> LossOutput:
        """The method on [N] numbers of the tokens of these examples."""
        row = partial(_row, own, device=policy.device)
        length = torch.tensor([len(c.ids) for e in own for c in e.completions], device=policy.device)
        kept = torch.tensor([float(k) for e in own for k in e.drawn.kept], device=policy.device)
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
            values=values if self._has_critic else None,
            old_values=row("values"),
            returns=row("returns"),
        )
        return checked(self.method.loss(batch, self.config), self.method.kind)

    def _text(self, logps: Tensor, pack: Pack) -> LossOutput:
        """The negative log-likelihood of [N] tokens of texts that are mixed in."""
        assert isinstance(self.config, PPO)
        term = Term(-logps, torch.ones_like(logps), self.config.ptx_weight)
        return LossOutput({"ptx": term}, {"ptx/loss": Term(-logps.detach(), torch.ones_like(logps))})


def _row(own: Sequence[Any], name: str, device: torch.device) -> Any:
    """[N] what a rollout found out about the tokens of these examples; None where it did not."""
    parts = [getattr(e.drawn, name) for e in own]
    return None if parts[0] is None else torch.cat(parts).to(device)


def _idle(causal_lm: Any, pack: Pack, head: Any) -> Tensor:
    """No value is wanted, but a critic that is left out would leave ranks out of step."""
    return token_values(causal_lm, empty_pack(0).to(pack.input_ids.device), head)


def _idle_policy(causal_lm: Any, pack: Pack) -> Tensor:
    """The same for a policy that is left out."""
    return token_logps(causal_lm, empty_pack(0).to(pack.input_ids.device))
