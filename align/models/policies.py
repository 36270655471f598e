"""Policies of the store put back into memory: one copy of every base, however many policies stand on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers import AutoConfig, PreTrainedTokenizerBase

from align.errors import ArtifactError
from align.models.base import load_base
from align.models.roles import RoleModel
from align.models.save import ADAPTER, MODEL
from align.models.source import reading
from align.models.tokenizer import load_tokenizer
from align.recipe.sizes import positions_of
from align.spec.model import ModelSettings

if TYPE_CHECKING:
    from align.artifacts.store import Store


@dataclass(frozen=True)
class PolicySource:
    """Where the weights of a policy, or of a reward model, are.

    Attributes:
        base: Folder or Hub name that the base is loaded from; the model itself where it was trained in full.
        revision: Hub revision of the base.
        adapter: PEFT folder, or None.
        model: How it was trained: quantization and dtype.
    """

    base: str
    revision: str | None
    adapter: Path | None
    model: ModelSettings

    @property
    def folder(self) -> Path:
        """The folder with the model's own tokenizer."""
        return self.adapter or Path(self.base)


def locate(store: Store, fingerprint: str, what: Literal["policy", "reward"] = "policy") -> PolicySource:
    """Find the base and the adapter of a policy, or of a reward model.

    Raises:
        ArtifactError: If it is not in the store, is damaged, or is no such model.
    """
    artifact = store.get(fingerprint)
    record = getattr(artifact.manifest, what)
    if record is None:
        made = f"stage {artifact.manifest.stage!r} ({artifact.manifest.kind})"
        raise ArtifactError(f"{made} made no {'reward model' if what == 'reward' else what}")
    if not record.adapter:
        return PolicySource(str(artifact.folder / MODEL), None, None, record.model)
    base = str(store.get(record.base).folder / MODEL) if record.base_kind == "stage" else record.base
    return PolicySource(base, record.revision, artifact.folder / ADAPTER, record.model)


def load_policies(store: Store, fingerprints: Mapping[str, str]) -> dict[str, RoleModel]:
    """Load policies as frozen roles. Those that share base, quantization and dtype share one `RoleModel`.

    Args:
        store: Where they are.
        fingerprints: Role -> fingerprint of the stage that trained it.

    Returns:
        Role -> the model that has this role; the same object wherever the base is the same.

    Raises:
        ArtifactError: If one is not in the store, is damaged, or is no policy.
    """
    loaded: dict[tuple[str, str | None, str, str], RoleModel] = {}
    found: dict[str, RoleModel] = {}
    for role, fingerprint in fingerprints.items():
        source = locate(store, fingerprint)
        model = source.model
        key = (source.base, source.revision, model.quantization, model.dtype)
        if key not in loaded:
            base = load_base(source.base, quantization=model.quantization, dtype=model.dtype, revision=source.revision)
            loaded[key] = RoleModel(base)
        found[role] = loaded[key]
        if source.adapter is None:
            found[role].add_base_role(role)
        else:
            found[role].add_adapter(role, folder=source.adapter, trainable=False)
    return found


def positions_of_policy(store: Store, fingerprint: str) -> int | None:
    """Longest sequence that a policy's base was made for, of which no weights are read; None if nothing tells."""
    source = locate(store, fingerprint)
    with reading(source.base, "model"):
        config = AutoConfig.from_pretrained(source.base, revision=source.revision)
    return positions_of(config.to_dict())


def load_policy_tokenizer(store: Store, fingerprint: str) -> PreTrainedTokenizerBase:
    """The tokenizer a policy was trained with."""
    return load_tokenizer(locate(store, fingerprint).folder)
