"""Who sits on the base of a stage that learns from its own completions, and what each seat takes of memory.

One copy of the base serves all of them, whatever their number: policy and critic are adapters that are trained,
reference and reward model adapters that are not, and the heads are a row each. A reward model that was trained
otherwise has a base of its own, which is told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.methods import get_method
from align.recipe.memory import ADAM_BYTES, MASTER_BYTES, Entropy, Parts, generation_memory
from align.recipe.references import references
from align.recipe.sizes import ModelSize
from align.spec.base import StageRef
from align.spec.model import LoraSettings
from align.spec.online import RolloutStage
from align.spec.stages import reference_of
from align.types import Needs

if TYPE_CHECKING:
    from align.recipe.graph import Graph, Node

TRAINED_BYTES = 2 * MASTER_BYTES + ADAM_BYTES
"""Of a trained parameter: weight, gradient and the moments."""
UPDATING = ("gradients", "activations", "head", "backward")
"""Parts that are there in an update and not while completions are drawn."""


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


def entropy_of(stage: RolloutStage) -> Entropy:
    """Every method on rollouts tells the policy's entropy; one that rewards it needs its gradient."""
    return "bonus" if getattr(stage, "entropy_weight", 0.0) else "metric"


def largest_example(stage: RolloutStage, *, shared: bool) -> int:
    """Tokens of a prompt and its completions that no pack is cut below.

    Args:
        stage: Its settings.
        shared: Whether a prompt stands in the pack once for all its completions.
    """
    k, longest, new = stage.completions, stage.train.max_tokens, stage.generation.max_new_tokens
    return max(longest - new, 0) + k * new if shared else k * longest


def drawing_memory(node: Node, size: ModelSize, compute_bytes: int) -> Parts:
    """What drawing takes beside the weights and the optimizer's moments, which stay."""
    assert isinstance(node.stage, RolloutStage)
    own = math.ceil(node.stage.prompts_per_rollout / node.launch.processes) * node.stage.completions
    return generation_memory(size, node.stage.generation, compute_bytes, completions=own)


def at_its_peak(update: Parts, drawing: Parts) -> Parts:
    """The parts of a stage that updates and draws in turns, in whichever phase takes more."""
    stays = {name: bytes_ for name, bytes_ in update.items() if name not in UPDATING}
    return update if sum(update.values()) > sum((stays | drawing).values()) else stays | drawing


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


def frozen_adapters(node: Node, graph: Graph) -> int:
    """How many adapters of other stages stand beside the trained ones of a stage, on its base."""
    if node.model is None or not isinstance(node.model.adapter, LoraSettings):
        return 0
    named = {e.name for e in references(node.stage) if isinstance(e.mark, StageRef) and e.loc != ("policy",)}
    if isinstance(node.stage, RolloutStage) and not shares_base(node, graph):
        named -= {node.stage.reward}
    others = (graph.nodes[name] for name in named)
    return sum(1 for each in others if each.model is not None and isinstance(each.model.adapter, LoraSettings))


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
