"""Combinations of settings that cannot work, in one table: each with the reason and what to do instead.

What is not here works: a LoRA adapter on a base in fp32 or NF4, and a model trained in full, each with no DeepSpeed,
ZeRO-1, 2 and 3, give on two ranks the losses and weights of one process. With int8 they do so up to its rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from align.errors import RecipeError
from align.methods.pretrain import Pretrain
from align.recipe.graph import Graph, Node
from align.recipe.lineage import model_loc
from align.recipe.load import LoadedRecipe
from align.recipe.origins import Loc
from align.recipe.peer_rules import PEER_RULES
from align.recipe.rope import Rope, rope_of
from align.recipe.rule import Rule
from align.recipe.seats import has_critic
from align.recipe.sizes import config_of_folder, positions_of
from align.recipe.sources import base_folder
from align.recipe.validate import combine
from align.spec.model import Architecture, LoraSettings
from align.spec.online import RolloutStage
from align.spec.stages import TrainedStage, reference_of


def _quantised_in_full(node: Node) -> bool:
    return node.model is not None and node.model.adapter == "none" and node.model.quantization != "none"


def _dropout_with_reference(node: Node) -> bool:
    adapter = node.model.adapter if node.model is not None else None
    return isinstance(adapter, LoraSettings) and adapter.dropout > 0 and reference_of(node.stage) is not None


def _int8_with_reference(node: Node) -> bool:
    quantised = node.model is not None and node.model.quantization == "int8"
    return quantised and reference_of(node.stage) is not None


def _full_seats(node: Node) -> bool:
    full = isinstance(node.stage, RolloutStage) and node.model is not None and node.model.adapter == "none"
    return full and (has_critic(node.stage) or reference_of(node.stage) is not None)  # type: ignore[arg-type]


def _dropout_in_rollouts(node: Node) -> bool:
    adapter = node.model.adapter if node.model is not None else None
    unreferenced = isinstance(node.stage, RolloutStage) and reference_of(node.stage) is None
    return unreferenced and isinstance(adapter, LoraSettings) and adapter.dropout > 0


def _int8_in_rollouts(node: Node) -> bool:
    quantised = node.model is not None and node.model.quantization == "int8"
    return quantised and isinstance(node.stage, RolloutStage) and reference_of(node.stage) is None


def _validated_rollouts(node: Node) -> bool:
    return isinstance(node.stage, RolloutStage) and node.stage.train.validation is not None


def _merged_by_one_rank(node: Node) -> bool:
    model = node.model
    return (
        model is not None and model.merge_parent and model.quantization == "none" and node.launch.deepspeed == "zero3"
    )


def _new_in_parts(node: Node) -> bool:
    return isinstance(node.stage, Pretrain) and node.launch.deepspeed == "zero3"


def _heads(node: Node) -> bool:
    a: Architecture | None = getattr(node.stage, "architecture", None)
    if a is None:
        return False
    return bool(a.hidden_size % (2 * a.heads) or a.heads % (a.kv_heads or a.heads))


RULES: tuple[Rule, ...] = (
    Rule(
        "quantised-full",
        ("model.quantization", "model.adapter"),
        "`quantization: int8` or `nf4` with `adapter: none`",
        _quantised_in_full,
        "quantised weights are integers without gradients: they cannot be trained",
        "write quantization: none, or give an adapter ({kind: lora})",
    ),
    Rule(
        "dropout-reference",
        ("model.adapter.dropout", "stage.reference"),
        "LoRA `dropout` above 0 with a method that has a `reference`",
        _dropout_with_reference,
        "the reference runs without dropout, so policy and reference would differ from the first step on, by noise",
        "write dropout: 0 in this stage's `model.adapter`",
    ),
    Rule(
        "int8-reference",
        ("model.quantization", "stage.reference"),
        "`quantization: int8` with a method that has a `reference`",
        _int8_with_reference,
        "int8 rounds activations by what else is in the batch, so policy and reference differ by noise of 0.01 nats "
        "per token and more",
        "write quantization: nf4",
    ),
    Rule(
        "rollout-full",
        ("model.adapter", "stage.kind"),
        "`adapter: none` with a method on rollouts that has a critic or a `reference`",
        _full_seats,
        "policy, reference and critic are adapters on one base, and a base that is trained moves under them",
        "give an adapter ({kind: lora}); `grpo`, `rloo` and `reinforce_pp` also train in full with reference: null",
    ),
    Rule(
        "rollout-dropout",
        ("model.adapter.dropout", "stage.kind"),
        "LoRA `dropout` above 0 with a method on rollouts",
        _dropout_in_rollouts,
        "completions are drawn without dropout, so the ratio of new to old policy would not start at 1",
        "write dropout: 0 in this stage's `model.adapter`",
    ),
    Rule(
        "rollout-int8",
        ("model.quantization", "stage.kind"),
        "`quantization: int8` with a method on rollouts",
        _int8_in_rollouts,
        "int8 rounds activations by what else is in the batch, so the ratio of new to old policy would not start at 1",
        "write quantization: nf4",
    ),
    Rule(
        "rollout-validation",
        ("stage.train.validation.fraction", "stage.kind"),
        "`validation` with a method on rollouts",
        _validated_rollouts,
        "there is no loss on held-out examples: what is learnt is the score, which every rollout tells",
        "remove it, and compare policies on held-out prompts in a `compare` stage",
    ),
    Rule(
        "merge-zero3",
        ("launch.deepspeed", "model.merge_parent", "model.quantization"),
        "`deepspeed: zero3` with `merge_parent: true` on an unquantised base",
        _merged_by_one_rank,
        "one rank merges alone, and under ZeRO-3 all ranks have to load such a base together: it would wait for ever",
        "write deepspeed: zero2 for this stage",
    ),
    Rule(
        "pretrain-zero3",
        ("launch.deepspeed", "stage.kind"),
        "`deepspeed: zero3` with `kind: pretrain`",
        _new_in_parts,
        "weights that are drawn in parts on several ranks are not those that the seed gives anywhere else",
        "write deepspeed: zero2 for this stage",
    ),
    Rule(
        "heads",
        ("stage.architecture.heads", "stage.architecture.hidden_size", "stage.architecture.kv_heads"),
        "`heads` that do not divide `hidden_size` into even parts, or `kv_heads` that do not divide `heads`",
        _heads,
        "all heads have the same width, an even one (rotary positions turn pairs), and share key-value heads evenly",
        "choose hidden_size as a multiple of 2 x heads, and kv_heads as a divisor of heads",
    ),
    *PEER_RULES,
)


def check_rules(graph: Graph) -> None:
    """Refuse a recipe with a combination that cannot work, a base that no stage could load, or too long sequences.

    Raises:
        RecipeError: Telling every such place with its values, the reason and the fix.
    """
    errors = [_error(rule, node, graph.loaded) for node in graph.nodes.values() for rule in RULES if rule.applies(node)]
    errors += [*_empty_bases(graph), *_too_long(graph)]
    if errors:
        raise combine(errors)


def rules_table() -> str:
    """The table as Markdown, for the documentation."""
    rows = [f"| {rule.when} | {rule.why} | {rule.fix} |" for rule in RULES]
    return "\n".join(["| What clashes | Why it cannot work | Instead |", "|---|---|---|", *rows]) + "\n"


def _error(rule: Rule, node: Node, loaded: LoadedRecipe) -> RecipeError:
    values = [f"{field.split('.')[-1]} {_shown(reduce(getattr, field.split('.'), node))}" for field in rule.fields]
    return RecipeError(
        f"stage `{node.name}` has {' with '.join(values)}: {rule.why}",
        where=loaded.where(*_loc(rule.fields[0], node, loaded)),
        fix=rule.fix,
    )


def _shown(value: Any) -> str:
    if isinstance(value, LoraSettings):
        return value.kind
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    if value is None or isinstance(value, bool):  # 1 equals True
        return {None: "unset", True: "true", False: "false"}[value]
    return str(value)


def _loc(field: str, node: Node, loaded: LoadedRecipe) -> Loc:
    part, *inside = field.split(".")
    if part == "model":
        return model_loc(loaded, node.name, *inside)
    if part == "launch":
        own = getattr(node.stage, "launch", None) is not None
        return ("stages", node.name, "launch", *inside) if own else ("launch", *inside)
    return ("stages", node.name, *inside)


def _kind(node: Node) -> str:
    assert isinstance(node.stage, TrainedStage)
    return str(type(node.stage).model_fields["kind"].default)


def _empty_bases(graph: Graph) -> Iterator[RecipeError]:
    """Folders named as a base that hold no model in safetensors."""
    for node in graph.nodes.values():
        if node.model is None or node.model.base in graph.nodes:
            continue
        folder = base_folder(node.model.base, graph.loaded.folder)
        if folder is None:
            continue
        missing = [
            name
            for name, glob in (("config.json", "config.json"), ("weights", "*.safetensors"))
            if not any(folder.glob(glob))
        ]
        if missing:
            yield RecipeError(
                f"the folder {node.model.base} holds no {' and no '.join(missing)}",
                where=graph.loaded.where(*model_loc(graph.loaded, node.name, "base")),
                fix="give a folder written by save_pretrained, with its weights as .safetensors",
            )


def _too_long(graph: Graph) -> Iterator[RecipeError]:
    """Stages with sequences for which their model has no positions, where those of the model are written down."""
    for node in graph.nodes.values():
        made = _positions(node, graph)
        train = node.stage.train if isinstance(node.stage, TrainedStage) else None
        if made is None or train is None:
            continue
        written = "max_tokens" in train.model_fields_set
        where = graph.loaded.where("stages", node.name, "train", "max_tokens")
        if made.rope is not None and train.max_tokens > made.rope.positions:
            yield made.rope.refusal(train.max_tokens, f"`{made.base}`", where, written)
        elif made.positions is None or train.max_tokens <= made.positions or not (written or made.written):
            continue  # of two defaults `align plan` tells
        else:
            yield RecipeError(
                f"max_tokens {train.max_tokens}{'' if written else ' (the default)'} is more than the "
                f"{made.positions} positions that `{made.base}` was made for",
                where=where,
                fix=f"write max_tokens: {made.positions} or less" + made.instead,
            )


@dataclass(frozen=True)
class _Made:
    """The longest sequence that a base was made for, whether somebody wrote it, and how to have longer ones.

    `rope` is there if its frequencies depend on the batch.
    """

    base: str
    positions: int | None
    written: bool = True
    instead: str = ""
    rope: Rope | None = None


def _positions(node: Node, graph: Graph) -> _Made | None:
    """Of the model a stage trains; None for one on the Hub, which need not be on this machine."""
    if isinstance(node.stage, Pretrain):
        architecture = node.stage.architecture
        written = "max_positions" in architecture.model_fields_set
        more = f", or raise architecture.max_positions of stage `{node.name}`"
        return _Made(node.name, architecture.max_positions, written, more)
    if node.model is None:
        return None
    if node.model.base in graph.nodes:
        return _positions(graph.nodes[node.model.base], graph)
    folder = base_folder(node.model.base, graph.loaded.folder)
    if folder is None:
        return None
    config = config_of_folder(folder)
    return _Made(node.model.base, positions_of(config), rope=rope_of(config))
