"""Combinations of settings that cannot work, in one table: each with the reason and what to do instead.

What is not here works: a LoRA adapter on a base in fp32 or NF4, and a model trained in full, each with no DeepSpeed,
ZeRO-1, 2 and 3, give on two ranks the losses and weights of one process. With int8 they do so up to its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from align.errors import RecipeError
from align.methods.dpo import DPO
from align.methods.kto import KTO
from align.methods.pretrain import Pretrain
from align.recipe.graph import Graph, Node
from align.recipe.lineage import model_loc
from align.recipe.load import LoadedRecipe
from align.recipe.origins import Loc
from align.recipe.rope import Rope, rope_of
from align.recipe.seats import has_critic
from align.recipe.sizes import config_of_folder, positions_of
from align.recipe.sources import base_folder
from align.recipe.validate import combine
from align.spec.data import records_of
from align.spec.model import Architecture, LoraSettings
from align.spec.online import RolloutStage
from align.spec.stages import TrainedStage, engine_of, reference_of


@dataclass(frozen=True)
class Rule:
    """One combination.

    Attributes:
        id: Its name.
        fields: The settings that clash, as attributes of a `Node`; the first is where the error points.
        when: The values that clash, for a reader of the table.
        applies: Whether a stage has them.
        why: Why that cannot work.
        fix: What to do instead.
    """

    id: str
    fields: tuple[str, ...]
    when: str
    applies: Callable[[Node], bool]
    why: str
    fix: str


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


def _trl(node: Node) -> bool:
    return engine_of(node.stage) == "trl"


def _trl_head(node: Node) -> bool:
    adapter = node.model.adapter if node.model is not None else None
    return _trl(node) and isinstance(adapter, LoraSettings) and "lm_head" in adapter.targets


def _trl_best(node: Node) -> bool:
    validation = node.stage.train.validation if _trl(node) and isinstance(node.stage, TrainedStage) else None
    return validation is not None and (validation.keep == "best" or validation.patience is not None)


def _unsmoothed(stage: DPO) -> bool:
    return stage.loss == "sigmoid" and stage.label_smoothing > 0


def _by_token(stage: DPO) -> bool:
    return stage.loss != "sigmoid" and stage.reduction == "token_mean"


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
    Rule(
        "trl-processes",
        ("launch.processes", "stage.engine"),
        "`engine: trl` with several `processes`",
        lambda node: _trl(node) and node.launch.processes > 1,
        "TRL would deal the examples of a step to other ranks than align does; the peer runs in one process",
        "write launch: {processes: 1} in this stage",
    ),
    Rule(
        "trl-deepspeed",
        ("launch.deepspeed", "stage.engine"),
        "`engine: trl` with `deepspeed`",
        lambda node: _trl(node) and node.launch.deepspeed != "none",
        "the peer runs without DeepSpeed",
        "write launch: {deepspeed: none} in this stage",
    ),
    Rule(
        "trl-best",
        ("stage.train.validation.keep", "stage.train.validation.patience", "stage.engine"),
        "`engine: trl` with `validation: {keep: best}` or `patience`",
        _trl_best,
        "the peer keeps no checkpoints, so it ends with its last weights",
        "write keep: last and no patience",
    ),
    Rule(
        "trl-head",
        ("model.adapter.targets", "stage.engine"),
        "`engine: trl` with an adapter on `lm_head`",
        _trl_head,
        "TRL multiplies by the head's own weight, so an adapter on it would not be trained",
        "leave lm_head out of targets",
    ),
    Rule(
        "trl-reduction",
        ("stage.reduction", "stage.engine"),
        "`engine: trl` with `reduction: sequence_mean`",
        lambda node: _trl(node) and getattr(node.stage, "reduction", "") == "sequence_mean",
        "TRL's SFT has the mean over tokens alone",
        "write reduction: token_mean, or engine: align",
    ),
    Rule(
        "trl-reference",
        ("stage.reference", "stage.engine"),
        "`engine: trl` with `reference: null`",
        lambda node: _trl(node) and getattr(node.stage, "reference", "") is None,
        "TRL takes the policy's start for the reference where none is given",
        "name a stage as reference, or write engine: align",
    ),
    Rule(
        "trl-smoothing",
        ("stage.label_smoothing", "stage.loss", "stage.engine"),
        "`engine: trl` with `label_smoothing` and `loss: sigmoid`",
        lambda node: _trl(node) and isinstance(node.stage, DPO) and _unsmoothed(node.stage),
        "TRL 1.16 accepts label_smoothing with its sigmoid loss and does not read it",
        "write loss: robust, or engine: align",
    ),
    Rule(
        "trl-loss",
        ("stage.loss", "stage.reduction", "stage.engine"),
        "`engine: trl` with `loss: robust` or `rso` and `reduction: token_mean`",
        lambda node: _trl(node) and isinstance(node.stage, DPO) and _by_token(node.stage),
        "TRL has the token mean for its sigmoid loss alone",
        "write reduction: sum or loss: sigmoid, or engine: align",
    ),
    Rule(
        "trl-kto",
        ("stage.train.global_batch_size", "stage.engine"),
        "`engine: trl` with `kind: kto` and one example per step",
        lambda node: _trl(node) and isinstance(node.stage, KTO) and node.stage.train.global_batch_size < 2,
        "TRL estimates the KL term from a batch of at least 2",
        "write a larger global_batch_size",
    ),
    Rule(
        "trl-ranked",
        ("stage.data", "stage.engine"),
        "`engine: trl` with `kind: reward` and ranked lists",
        lambda node: _trl(node) and any(records_of(source) == "ranked" for source in node.data.values()),
        "TRL's reward trainer knows pairs alone",
        "write convert: all_pairs in the data (each pair then counts alike), or engine: align",
    ),
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
