"""What `engine: trl` refuses: settings that TRL's trainers cannot be told, or would take and ignore."""

from __future__ import annotations

from collections.abc import Callable

from align.methods.dpo import DPO
from align.methods.grpo import GRPO
from align.methods.kto import KTO
from align.methods.rloo import RLOO
from align.recipe.graph import Node
from align.recipe.rule import Rule
from align.spec.data import records_of
from align.spec.model import LoraSettings
from align.spec.online import RolloutStage
from align.spec.stages import TrainedStage, engine_of

ALIGN = "write engine: align"


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


def _trl_reference(node: Node) -> bool:
    paired = _trl(node) and not isinstance(node.stage, RolloutStage)
    return paired and getattr(node.stage, "reference", "") is None


def _on_rollouts(holds: Callable[[RLOO | GRPO], bool]) -> Callable[[Node], bool]:
    """Whether TRL trains a stage on rollouts of which this holds."""
    return lambda node: _trl(node) and isinstance(node.stage, RLOO | GRPO) and holds(node.stage)


def _clips_otherwise(stage: RLOO | GRPO) -> bool:
    """TRL's RLOO clips the sum that a missing end has changed already."""
    if stage.score_clip is None or (isinstance(stage, RLOO) and stage.missing_eos == "keep"):
        return False
    alike = stage.missing_eos == "replace" and abs(stage.missing_eos_score) <= stage.score_clip
    return isinstance(stage, GRPO) or not alike


def _counts_the_dropped(stage: RLOO | GRPO) -> bool:
    by_token = isinstance(stage, GRPO) and stage.aggregation == "token_mean"
    return stage.missing_eos == "drop" and not by_token


def _other_estimator(stage: RLOO | GRPO) -> bool:
    return stage.pull > 0 and stage.kl_estimator != ("k1" if isinstance(stage, RLOO) else "k3")


PEER_RULES: tuple[Rule, ...] = (
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
        "`engine: trl` with `reference: null` in a stage on pairs or labels",
        _trl_reference,
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
    Rule(
        "trl-stop-kl",
        ("stage.stop_kl", "stage.engine"),
        "`engine: trl` with `stop_kl`",
        _on_rollouts(lambda stage: stage.stop_kl is not None),
        "TRL makes every update of a rollout",
        f"leave it out, or {ALIGN}",
    ),
    Rule(
        "trl-normalise",
        ("stage.normalise_scores", "stage.engine"),
        "`engine: trl` with `normalise_scores`",
        _on_rollouts(lambda stage: stage.normalise_scores),
        "TRL keeps no statistics of the rollouts before",
        f"leave it out (a `reward` stage normalises its rewards itself), or {ALIGN}",
    ),
    Rule(
        "trl-score-clip",
        ("stage.score_clip", "stage.missing_eos", "stage.engine"),
        "`engine: trl` with `score_clip`, for `grpo` or beside a `missing_eos` that it would cut",
        _on_rollouts(_clips_otherwise),
        "TRL's GRPO clips no rewards, and its RLOO clips them with what a missing end costs",
        f"leave it out; for rloo write missing_eos: keep, or replace with a missing_eos_score within it; or {ALIGN}",
    ),
    Rule(
        "trl-drop",
        ("stage.missing_eos", "stage.engine"),
        "`engine: trl` with `missing_eos: drop`, except for `grpo` with `aggregation: token_mean`",
        _on_rollouts(_counts_the_dropped),
        "TRL's mean over completions counts those that it leaves out",
        f"write missing_eos: replace, subtract or keep, for grpo aggregation: token_mean, or {ALIGN}",
    ),
    Rule(
        "trl-drop-stop",
        ("stage.generation.stop", "stage.missing_eos", "stage.engine"),
        "`engine: trl` with `missing_eos: drop` and `generation.stop`",
        _on_rollouts(lambda stage: stage.missing_eos == "drop" and bool(stage.generation.stop)),
        "TRL takes a completion for cut off that ends with no token for an end",
        f"remove the stop strings, write missing_eos: replace, or {ALIGN}",
    ),
    Rule(
        "trl-kl-estimator",
        ("stage.kl_estimator", "stage.engine"),
        "`engine: trl` with a `kl_estimator` other than k1 for `rloo` and k3 for `grpo`",
        _on_rollouts(_other_estimator),
        "TRL takes k1 off the rewards of RLOO and k3 for the loss of GRPO",
        f"write kl_estimator: k1 (rloo) or k3 (grpo), or {ALIGN}",
    ),
    Rule(
        "trl-kl-target",
        ("stage.kl_target", "stage.engine"),
        "`engine: trl` with `kl_target`",
        _on_rollouts(lambda stage: isinstance(stage, RLOO) and stage.kl_target is not None),
        "TRL's beta stays as it is",
        f"leave it out, or {ALIGN}",
    ),
    Rule(
        "trl-ratio",
        ("stage.ratio", "stage.engine"),
        "`engine: trl` with `kind: rloo` and `ratio: none`",
        _on_rollouts(lambda stage: isinstance(stage, RLOO) and stage.ratio == "none"),
        "TRL's RLOO has the clipped ratio of whole completions alone",
        f"write ratio: sequence, or {ALIGN}",
    ),
    Rule(
        "trl-entropy",
        ("stage.entropy_weight", "stage.engine"),
        "`engine: trl` with `kind: rloo` and `entropy_weight`",
        _on_rollouts(lambda stage: isinstance(stage, RLOO) and stage.entropy_weight > 0),
        "TRL's RLOO has no entropy in its loss",
        f"leave it out, or {ALIGN}",
    ),
)
