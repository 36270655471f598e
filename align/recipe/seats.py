"""Who sits on the base of a stage that learns from its own completions, and what each seat takes of memory.

One copy of the base serves all of them, whatever their number: policy and critic are adapters that are trained,
reference and reward model adapters that are not, and the heads are a row each. A reward model that was trained
otherwise has a base of its own, which is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.methods import get_method
from align.recipe.memory import ADAM_BYTES, MASTER_BYTES
from align.recipe.sizes import ModelSize
from align.spec.model import LoraSettings
from align.spec.online import RolloutStage
from align.spec.stages import reference_of
from align.types import Needs

if TYPE_CHECKING:
    from align.recipe.graph import Graph, Node

TRAINED_BYTES = 2 * MASTER_BYTES + ADAM_BYTES
"""Of a trained parameter: weight, gradient and the moments."""


@dataclass(frozen=True)
class Seat:
    """One role of a stage.

    Attributes:
        role: Its name.
        bytes: What it takes beside the shared base.
        trained: Whether it is trained.
        own_base: Whether it brings a base of its own.
    """

    role: str
    bytes: int
    trained: bool
    own_base: bool = False


def has_critic(stage: RolloutStage) -> bool:
    """Whether the stage's method learns values."""
    return Needs.VALUES in get_method(str(type(stage).model_fields["kind"].default)).needs


def shares_base(node: Node, graph: Graph) -> bool:
    """Whether the reward model that a stage names is an adapter on the base that its policy stands on."""
    assert isinstance(node.stage, RolloutStage)
    reward = graph.nodes[node.stage.reward] if node.stage.reward is not None else None
    if reward is None or reward.model is None or node.model is None:
        return False
    mine, theirs = node.model, reward.model
    alike = (mine.base, mine.revision, mine.quantization) == (theirs.base, theirs.revision, theirs.quantization)
    lora = isinstance(mine.adapter, LoraSettings) and isinstance(theirs.adapter, LoraSettings)
    return alike and lora and not mine.merge_parent and not theirs.merge_parent


def seats(node: Node, graph: Graph, size: ModelSize, *, own_reward: int | None = None) -> list[Seat]:
    """The roles of a stage on rollouts.

    Args:
        node: The stage.
        graph: Its recipe.
        size: Its model.
        own_reward: Bytes of a reward model with a base of its own, where they are known.
    """
    assert isinstance(node.stage, RolloutStage)
    lora = node.model.adapter if node.model is not None and isinstance(node.model.adapter, LoraSettings) else None
    adapter = size.parameters if lora is None else size.adapter_parameters(lora)
    found = [Seat("policy", adapter * TRAINED_BYTES, trained=True)]
    if has_critic(node.stage):
        found.append(Seat("critic", (adapter + size.hidden) * TRAINED_BYTES, trained=True))
    if reference_of(node.stage) is not None:
        found.append(Seat("reference", adapter * MASTER_BYTES, trained=False))
    if node.stage.reward is not None:
        shared = shares_base(node, graph)
        own = (adapter + size.hidden) * MASTER_BYTES if shared else own_reward or 0
        found.append(Seat("reward model", own, trained=False, own_base=not shared))
    return found
