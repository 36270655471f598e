"""What RLHF's memory is measured on: four roles on one base or on four, their rollouts, and their optimizer steps.

A rollout is made by align's own `Online`, and a step is taken as `AlignTrainer.training_step` takes it, optimizer
included. Both ask a model for a role; whether the roles share a base is the only thing that differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.data import Completion, Example, PromptExample
from align.logps.engine import choose_packing
from align.methods import get_method
from align.methods.ppo import PPO
from align.methods.sft import SFT
from align.models import train_tokenizer
from align.models.roles import RoleModel
from align.spec.model import TokenizerSettings
from align.spec.scored import REWARD
from align.training.guards import FiniteGradients
from align.training.online import Judges, Online
from align.training.rollout_step import CRITIC, RolloutStep
from align.training.schedule import RolloutSchedule
from align.training.step import Step, Totals, scaled_loss
from bench.memory import held_bytes, peak_bytes, tensors_of
from bench.worlds import Shape, build_base, copy_of, draw

POLICY, REFERENCE = "policy", "reference"
ROLES = (POLICY, CRITIC, REFERENCE, REWARD)
TRAINED, SCORING = (POLICY, CRITIC), (CRITIC, REWARD)
Adapters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """How much is drawn and trained on.

    Attributes:
        prompt: Tokens of a prompt, P.
        completion: Tokens of a completion, R; a random model ends none by itself.
        drawn: Prompts of a rollout.
        trained: Prompts of an optimizer step.
        pack_tokens: Token budget of a forward pass.
    """

    prompt: int
    completion: int
    drawn: int
    trained: int
    pack_tokens: int

    @property
    def stage(self) -> PPO:
        """The settings that a recipe would have."""
        tokens = self.prompt + self.completion
        train = {"global_batch_size": self.trained, "max_tokens": tokens, "pack_tokens": self.pack_tokens}
        return PPO(
            prompts="p",
            reward="rm",
            reference="sft",
            prompts_per_rollout=self.drawn,
            epochs_per_rollout=2,
            missing_eos="keep",
            generation={"max_new_tokens": self.completion},
            train=train,
        )

    def prompts(self, vocabulary: int) -> list[PromptExample]:
        """Random ones, the same in every run."""
        g = torch.Generator().manual_seed(20)
        ids = [torch.randint(1, vocabulary, (self.prompt,), generator=g).tolist() for _ in range(self.drawn)]
        return [PromptExample(i, "", [{"role": "user", "content": ""}], each) for i, each in enumerate(ids)]


def seated(base: Any, shape: Shape, roles: Sequence[str]) -> RoleModel:
    """A base with a random adapter for each role, and a scalar head where it has one; the same in every model."""
    model = RoleModel(base)
    for role in roles:
        model.add_adapter(role, settings=shape.adapter, trainable=role in TRAINED)
        if role in SCORING:
            model.add_head(role)
        draw(model.tensors(role), seed=ROLES.index(role))
    return model.train()


class Apart(nn.Module):
    """Four models, asked as if they were one: every role has a base of its own.

    Args:
        models: Role -> its model.
    """

    def __init__(self, models: Mapping[str, RoleModel]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(dict(models))

    @property
    def config(self) -> Any:
        return self._of(POLICY).config

    def forward(self, role: str, function: Any, *args: Any, beside: Sequence[tuple[str, Any]] = ()) -> Any:
        """As `RoleModel.forward`."""
        found = [self._of(name)(name, each, *args) for name, each in ((role, function), *beside)]
        return tuple(found) if beside else found[0]

    def trainable_state(self) -> dict[str, Tensor]:
        """Under the names that one model with all roles has."""
        critic = self._of(CRITIC).trainable_state()
        return self._of(POLICY).trainable_state() | {f"{CRITIC}/{name}": t for name, t in critic.items()}

    def _of(self, role: str) -> RoleModel:
        model = self.models[role]
        assert isinstance(model, RoleModel)
        return model


@dataclass
class Arm:
    """A model with its roles, ready to be trained.

    Attributes:
        model: A `RoleModel` or `Apart`.
        bases: Bytes of bases, a shared one once.
        shape: Of the model.
        device: Where it is.
    """

    model: Any
    bases: int
    shape: Shape
    device: torch.device

    @classmethod
    def on_one_base(cls, base: Any, shape: Shape, device: torch.device, roles: Sequence[str] = ROLES) -> Arm:
        """Roles that share a base, which is left as it is."""
        return cls(seated(copy_of(base), shape, roles), held(base), shape, device)

    @classmethod
    def on_four_bases(cls, shape: Shape, device: torch.device) -> Arm:
        """Each role with an equal base of its own, as four loaded models have."""
        bases = {role: build_base(shape, device) for role in ROLES}
        size = sum(held(base) for base in bases.values())
        return cls(Apart({role: seated(base, shape, [role]) for role, base in bases.items()}), size, shape, device)

    @property
    def adapters(self) -> int:
        """Bytes of adapters and heads."""
        return held(self.model) - self.bases

    @property
    def models(self) -> Iterable[tuple[str, Any]]:
        """The models, each with a role of its own to ask it by."""
        return self.model.models.items() if isinstance(self.model, Apart) else [(POLICY, self.model)]

    def packing(self) -> Any:
        """What the engine chooses, once every model has been made ready for it."""
        found: list[Any] = []
        choose = lambda causal_lm, *_: found.append(choose_packing(causal_lm, dropout=False, wanted="auto"))  # noqa: E731
        with torch.no_grad(), self.autocast():
            for role, model in self.models:
                model(role, choose)
        return found[0]

    def autocast(self) -> AbstractContextManager[Any]:
        return self.shape.autocast(self.device)


def held(module: nn.Module) -> int:
    """Bytes of all tensors of a module."""
    return held_bytes(tensors_of(module))


class Rollouts(Online):
    """Rollouts whose two phases are measured: `peaks` has the most bytes that lived at once in each."""

    def __init__(self, arm: Arm, task: Task, work: Path) -> None:
        stage, self.arm, self.peaks = task.stage, arm, dict[str, int]()
        text = ["the sea is wide and the hills are green " * 4]
        super().__init__(
            stage,
            get_method("ppo"),
            prompts=task.prompts(arm.shape.vocab),
            judges=Judges({}, {REWARD: 1.0}, "shared"),
            schedule=RolloutSchedule.of(stage, task.drawn),
            tokenizer=train_tokenizer(text, TokenizerSettings(vocab_size=300)),
            reference=True,
            work=work,
            report=lambda *_: None,
        )

    def _draw(self, *args: Any) -> Any:
        return self._measured("drawing", super()._draw, *args)

    def _passes(self, *args: Any, **settings: Any) -> None:
        self._measured("scoring", partial(super()._passes, **settings), *args)

    def _measured(self, phase: str, function: Any, *args: Any) -> Any:
        found: list[Any] = []

        def run() -> None:
            with self.arm.autocast():
                found.append(function(*args))

        self.peaks[phase] = peak_bytes(run, self.arm.device)
        return found[0]


@dataclass(frozen=True)
class Taken:
    """What a step came to: its loss and its gradients by name, which numpy holds and no tensor."""

    loss: float
    gradients: Mapping[str, Any]


class Updates:
    """Optimizer steps of an arm, as the trainer takes them.

    Args:
        arm: What is trained.
        step: A `Step` or `RolloutStep`.
    """

    def __init__(self, arm: Arm, step: Step) -> None:
        self.arm, self.step = arm, step
        self.trained: dict[str, Tensor] = arm.model.trainable_state()
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-3, weight_decay=0.0)
        self.watch = FiniteGradients(self.trained.values())  # type: ignore[arg-type]

    @property
    def states(self) -> int:
        """Bytes of the optimizer's moments."""
        return sum(t.nbytes for own in self.optimizer.state.values() for t in own.values() if isinstance(t, Tensor))

    @property
    def gradients(self) -> int:
        """Bytes of the gradients while there are any."""
        return sum(t.nbytes for t in self.trained.values())

    def packs(self, examples: Sequence[Example]) -> list[int]:
        """Tokens of each forward pass."""
        return [pack.tokens for pack in self.step.packs(examples)]

    def take(self, examples: Sequence[Example], *, look: bool = False) -> Taken:
        """One step; its gradients are released.

        Args:
            examples: What it learns from.
            look: Whether to copy the gradients.
        """
        arm, step, metrics = self.arm, self.step, Totals()
        packs = step.packs(examples)
        weights = step.weights(examples, packs)
        total = torch.zeros((), device=arm.device)
        for pack in packs:
            with arm.autocast():
                output = step.terms(arm.model, pack.to(arm.device), examples, None)
            loss = scaled_loss(output, weights)
            metrics.add(output.metrics)
            loss.backward()
            total += loss.detach()
        assert not self.watch.pop()
        found = {}
        if look:
            found = {n: t.grad.float().cpu().numpy().copy() for n, t in self.trained.items() if t.grad is not None}
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Taken(float(total), found)


def ppo_updates(arm: Arm, task: Task, packing: Any) -> Updates:
    """Policy and critic, from a rollout."""
    return Updates(arm, RolloutStep(get_method("ppo"), task.stage, task.pack_tokens, packing))


def sft_updates(arm: Arm, task: Task, packing: Any) -> Updates:
    """The policy alone, from completions that are given."""
    return Updates(arm, Step(get_method("sft"), SFT(data="d"), task.pack_tokens, packing))


def given(examples: Sequence[Example]) -> list[Example]:
    """Drawn examples as demonstrations of the same tokens."""
    return [
        Example(e.row, e.prompt_ids, tuple(Completion(c.ids, c.mask, False) for c in e.completions), 1.0)
        for e in examples
    ]
