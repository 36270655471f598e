"""Reward models put back into memory: those of the store, and sequence classifiers that somebody else trained."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from align.errors import RecipeError
from align.models.base import Quantization, load_base
from align.models.heads import SCORE
from align.models.policies import PolicySource, locate
from align.models.roles import RoleModel
from align.models.source import reading
from align.spec.base import Settings

DType = Literal["auto", "float32", "bfloat16"]

if TYPE_CHECKING:
    from align.artifacts.store import Store

NORMALIZATION = "normalization.json"


class Normalization(Settings):
    """`normalization.json` of a reward model: its rewards become (r - mean) / std.

    *Source*: arXiv:1909.08593, section 2; the standard deviation is the biased one.
    """

    mean: float = 0.0
    std: PositiveFloat = 1.0
    n: int = 0
    """Completions they were taken from."""
    on: Literal["none", "data", "samples"] = "none"
    """Whose completions: nobody's, the training data's, or the policy's that the reward model started from."""


def read_normalization(artifact: Path) -> Normalization:
    """What a reward model's artifact says of its scale."""
    path = artifact / NORMALIZATION
    return Normalization.model_validate_json(path.read_text()) if path.exists() else Normalization()


def load_reward(
    store: Store, fingerprint: str, role: str = "reward", *, onto: RoleModel | None = None, trainable: bool = False
) -> tuple[RoleModel, Normalization]:
    """Load a reward model of the store as a role with its head, which normalises.

    Args:
        store: Where it is.
        fingerprint: Of the stage that trained it.
        role: What it is called.
        onto: A model on the same base, for an adapter to join. A base of its own is loaded if absent.
        trainable: Whether the role is trained, without dropout: a critic starts as the reward model. Adapters only.

    Raises:
        ArtifactError: If it is not in the store, is damaged, or is no reward model.
    """
    source = locate(store, fingerprint, "reward")
    normalization = read_normalization(store.folder(fingerprint))
    if source.adapter is None:
        model = load_scorer(source.base, role, dtype=source.model.dtype)
    else:
        model = onto or RoleModel(_base_of(source))
        dropout = 0.0 if trainable else None
        model.add_adapter(role, folder=source.adapter, with_head=True, trainable=trainable, dropout=dropout)
    head = model.head(role)
    head.mean, head.std = normalization.mean, normalization.std
    return model, normalization


def _base_of(source: PolicySource) -> PreTrainedModel:
    settings = source.model
    base, _ = load_reward_base(
        source.base, quantization=settings.quantization, dtype=settings.dtype, revision=source.revision
    )
    return base


def load_scorer(
    source: str | Path,
    role: str = "reward",
    *,
    quantization: Quantization = "none",
    dtype: DType = "auto",
    revision: str | None = None,
) -> RoleModel:
    """Load a sequence classifier with one label as a model of its own, whose one role is frozen and has its head.

    Args:
        source: Folder or Hub name.
        role: What the role is called.
        quantization: Of the body.
        dtype: Compute dtype of the body; the head computes in fp32.
        revision: Hub revision.

    Raises:
        RecipeError: If it is no such model, or one that does not read from left to right.
        LaunchError: If the Hub cannot be reached.
    """
    base, score = load_reward_base(source, quantization=quantization, dtype=dtype, revision=revision)
    if score is None:
        raise RecipeError(
            f"{source} is no reward model: its architecture has no sequence classification head",
            where="model.base",
            fix="name a model of an architecture like LlamaForSequenceClassification",
        )
    roles = RoleModel(base)
    roles.add_base_role(role)
    roles.add_head(role, weight=score)
    return roles


def load_reward_base(
    source: str | Path,
    *,
    quantization: Quantization = "none",
    dtype: DType = "auto",
    revision: str | None = None,
) -> tuple[PreTrainedModel, Tensor | None]:
    """What a reward model can start from: a causal LM, or the body of a reward model and the weight of its head.

    Args:
        source: Folder or Hub name.
        quantization: Of the body.
        dtype: Compute dtype.
        revision: Hub revision.

    Raises:
        RecipeError: If it is neither.
        LaunchError: If the Hub cannot be reached.
    """
    scorer = _is_classifier(source, revision)
    base = load_base(source, quantization=quantization, dtype=dtype, revision=revision, scorer=scorer)
    return base, _take_head(base, source) if scorer else None


def _is_classifier(source: str | Path, revision: str | None) -> bool:
    with reading(source, "model"):
        config = AutoConfig.from_pretrained(str(source), revision=revision)
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _take_head(base: PreTrainedModel, source: str | Path) -> Tensor:
    """The weight of a classifier's head, [1, H] in fp32; the classifier is left without one."""
    score = getattr(base, SCORE, None)
    causal = type(base.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not causal or not isinstance(score, nn.Linear) or score.bias is not None or score.out_features != 1:
        raise RecipeError(
            f"{source} ({type(base).__name__}, {base.config.num_labels} labels) is no reward model that align can run",
            where="model.base",
            fix=f"name a decoder with one label and a head `{SCORE}` without bias, such as a Llama, Qwen or Gemma",
        )
    with _gathered(score.weight):
        weight = score.weight.detach().float().clone()
    setattr(base, SCORE, nn.Identity())
    return weight


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    """Whole on every rank, where ZeRO-3 took it apart."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
