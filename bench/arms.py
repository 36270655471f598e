"""What is timed: an optimizer step's forward and backward passes, as one arm of a comparison computes them.

Here is the common ground and align's own arms: as it comes, and with each technique switched off. The switches are put
on from outside, around the call; align has no settings for what is never worth switching off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor, nn

from align.data.chat import Example
from align.logps import Pack, Packing, completion_logps, token_logps
from align.logps.attention import NAME
from align.logps.engine import choose_packing
from align.methods import get_method
from align.methods.dpo import DPO
from align.methods.reward import Reward
from align.methods.rrhf import RRHF
from align.models.roles import RoleModel
from align.training import step as steps
from align.training.step import Step, Totals, scaled_loss
from bench.arithmetic import Flops, Layout, forward_flops, layout, lengths, step_flops
from bench.worlds import BETA, World

CONFIGS = {"dpo": DPO(data="d", reference="base", beta=BETA), "reward": Reward(data="d"), "rrhf": RRHF(data="d")}


PLAIN_ROWS, SMALL_PACKS = "plain rows", "small packs"
NOTES = {
    "ours": "packing auto, the reference precomputed, one step of align's trainer without its optimizer",
    SMALL_PACKS: "the same with as many pairs in a forward pass as the tuned TRL has, where those are fewer",
    PLAIN_ROWS: "the same in padded rows, as ranked candidates have no peer",
}


class Arm(Protocol):
    """One way to compute the same step."""

    name: str
    passes: str
    """How the step is cut into forward passes, in words."""
    deterministic: bool
    """Whether align's deterministic operations are on."""

    def step(self) -> Tensor:
        """Forward and backward of one optimizer step; the loss."""

    def values(self) -> Tensor:
        """Log-probabilities of all response tokens, or rewards of all responses, in the order of the examples."""

    def parameters(self) -> dict[str, Tensor]:
        """What is trained, under the names that PEFT writes to disk."""

    def flops(self) -> Flops:
        """What the step has to compute."""

    def switched(self) -> Any:
        """A context in which the arm is set up."""


@dataclass(frozen=True)
class Ablation:
    """One technique switched off.

    Attributes:
        name: Of the arm.
        technique: What is missing, in words.
        without: Which switch.
        beside: The arm that has it and is otherwise the same.
        methods: Which methods have the technique.
        padded: Only data of different lengths shows it.
    """

    name: str
    technique: str
    without: str
    beside: str = "ours"
    methods: tuple[str, ...] = ("dpo", "reward", "rrhf")
    padded: bool = False


ABLATIONS = (
    Ablation("flat", "a prompt once for all its responses", "sharing"),
    Ablation("rows", "no padding", "packing", beside="flat", padded=True),
    Ablation("rows, mask", "no mask where none is needed", "no mask", beside="rows", padded=True),
    Ablation("head twice", "the head's gradient in the forward pass", "head", methods=("dpo", "rrhf")),
    Ablation("every position", "only response positions scored", "positions", methods=("dpo", "rrhf")),
    Ablation("live reference", "the reference computed once", "reference", methods=("dpo",)),
    Ablation("checkpointing", "no recomputation of layers", "checkpointing"),
)


class Ours:
    """A step as `AlignTrainer.training_step` takes it: packs, terms, scaled loss, backward.

    Args:
        world: What it runs on.
        roles: The model; arms may share one.
        name: Of the arm.
        without: The technique that is switched off, if one is.
        beside: An arm whose reference is taken over.
        pack_tokens: Token budget of a forward pass, instead of the shape's.
    """

    deterministic = True

    def __init__(
        self,
        world: World,
        roles: RoleModel,
        name: str = "ours",
        without: str = "",
        beside: Ours | None = None,
        pack_tokens: int | None = None,
    ) -> None:
        self.world, self.roles, self.name, self.without = world, roles, name, without
        self.packing = self._packing()
        method = get_method(world.case.kind)
        self.config = CONFIGS[world.case.kind]
        self.task = Step(method, self.config, pack_tokens or world.shape.pack_tokens, self.packing)
        self.references = beside.references if beside else self.reference() if method.reference else None
        self.groups = [[world.examples[i] for i in pack.examples] for pack in self.task.packs(world.examples)]
        self.passes = f"{self.packing}, {len(self.groups)} pack{'s' * (len(self.groups) > 1)}"

    def _packing(self) -> Packing:
        if self.without in ("packing", "no mask"):
            return "rows"
        wanted: Any = "flat" if self.without == "sharing" else "auto"
        found: list[Packing] = []
        with torch.no_grad(), self.world.autocast():
            choose = lambda causal_lm, *_: found.append(choose_packing(causal_lm, dropout=False, wanted=wanted))  # noqa: E731
            self.roles(self.world.role, choose)
        return found[0]

    def reference(self) -> list[tuple[float, ...]]:
        """The reference's log-probabilities, as align computes them once before the first step."""
        with self.world.autocast():
            return completion_logps(
                self.roles, "reference", self.world.examples, self.world.shape.pack_tokens, self.packing
            )

    def step(self) -> Tensor:
        world, task, metrics = self.world, self.task, Totals()
        packs = task.packs(world.examples)
        weights = task.weights(world.examples, packs)
        references = self.reference() if self.without == "reference" else self.references
        total = torch.zeros((), device=world.device)
        for pack in packs:
            with world.autocast():
                output = task.terms(self.roles, pack.to(world.device), world.examples, references)
            loss = scaled_loss(output, weights)
            metrics.add(output.metrics)
            loss.backward()
            total += loss.detach()
        return total

    def values(self) -> Tensor:
        """With gradients on, as the head then takes another way."""
        function = steps.last_rewards if self.world.role == "reward" else steps.token_logps
        found: dict[tuple[int, int], Tensor] = {}
        for pack in self.task.packs(self.world.examples):
            with self.world.autocast():
                values = self.roles(self.world.role, function, pack.to(self.world.device)).detach()
            owners = [(i, k) for i in pack.examples for k in range(self.world.case.k)]
            for c, owner in enumerate(owners):
                found[owner] = values[c : c + 1] if self.world.role == "reward" else values[pack.owner == c]
        return torch.cat([found[key] for key in sorted(found)]).float().cpu()

    def parameters(self) -> dict[str, Tensor]:
        return self.roles.trainable_state()

    def layout(self) -> Layout:
        """Positions and pairs, over all packs."""
        groups = [lengths(group) for group in self.groups]
        return layout(groups, self.packing, everywhere=self.without == "positions")

    def flops(self) -> Flops:
        head = "none" if self.world.role == "reward" else "recomputed" if self.without == "head" else "once"
        return step_flops(
            self.world.shape.sizes,
            self.layout(),
            head=head,
            checkpointing=self.without == "checkpointing",
            input_gradients=self.without == "checkpointing",
            live_reference=self.without == "reference",
        )

    def reference_flops(self) -> Flops:
        """What `reference` has to compute."""
        return forward_flops(self.world.shape.sizes, self.layout(), adapter=False)

    @contextmanager
    def switched(self) -> Iterator[None]:
        body = self.roles.causal_lm.model
        before = body.config._attn_implementation
        body.set_attn_implementation("sdpa" if self.packing == "rows" else NAME)
        try:
            with ExitStack() as stack:
                if self.without == "head":
                    stack.enter_context(_unknown_head(self.roles.causal_lm.lm_head))
                if self.without == "positions":
                    stack.enter_context(patch("align.training.step.token_logps", _everywhere))
                if self.without == "no mask":
                    stack.enter_context(patch("align.logps.head.hidden_states", _masked))
                yield
        finally:
            body.set_attn_implementation(before)


def our_arms(world: World, *, ablations: bool) -> list[Ours]:
    """align as it comes, and with each technique switched off that its data can show."""
    roles = world.roles()
    arms = [Ours(world, roles)]
    padded = len({p + r for p, responses in world.lengths for r in responses}) > 1
    for each in ABLATIONS if ablations else ():
        if world.case.kind in each.methods and (padded or not each.padded):
            own = world.roles(checkpointing=True) if each.without == "checkpointing" else roles
            arms.append(Ours(world, own, each.name, each.without, arms[0]))
    return arms


def plain_rows(world: World, beside: Ours) -> Ours:
    """Padded rows and all else as it is: what ranked candidates are compared with, as there is no peer."""
    return Ours(world, beside.roles, PLAIN_ROWS, "packing", beside)


def small_packs(world: World, beside: Ours, pairs: int) -> Ours:
    """As it comes, but with no more pairs in a forward pass than a peer has: memory goes with that."""
    longest = max(p + sum(responses) for p, responses in world.lengths)
    return Ours(world, beside.roles, SMALL_PACKS, "", beside, pairs * longest)


class _OtherHead(nn.Linear):
    """A head that is not known to be frozen: logits in tiles, and once more in the backward pass."""


@contextmanager
def _unknown_head(head: nn.Module) -> Iterator[None]:
    head.__class__ = _OtherHead
    try:
        yield
    finally:
        head.__class__ = nn.Linear


def _everywhere(causal_lm: Any, pack: Pack) -> Tensor:
    """The log-probabilities of a pack, after the head has scored all other positions too."""
    others = torch.ones(pack.tokens, dtype=torch.bool, device=pack.positions.device)
    others[pack.positions] = False
    rest = others.nonzero()[:, 0]
    more = replace(
        pack,
        positions=torch.cat([pack.positions, rest]),
        targets=torch.cat([pack.targets, pack.input_ids.flatten()[rest]]),
    )
    return token_logps(causal_lm, more)[: len(pack.targets)]


def _masked(causal_lm: Any, pack: Pack) -> Tensor:
    """Hidden states of padded rows, with the attention mask that most trainers pass."""
    rows, width = pack.input_ids.shape
    ends = pack.last - torch.arange(rows, device=pack.last.device) * width
    mask = (torch.arange(width, device=ends.device) <= ends[:, None]).long()
    out = causal_lm.model(input_ids=pack.input_ids, attention_mask=mask, use_cache=False)
    return out.last_hidden_state.flatten(0, 1)


def forget(arm: Arm) -> None:
    """Release the gradients of a step."""
    for parameter in arm.parameters().values():
        parameter.grad = None


def in_order(examples: Sequence[Example]) -> list[int]:
    """Examples from the longest row to the shortest, as a trainer that groups by length sees them."""
    longest = [len(e.prompt_ids) + max(len(c.ids) for c in e.completions) for e in examples]
    return sorted(range(len(examples)), key=lambda i: -longest[i])
