"""Names on the Hub held at the commits that the fingerprints were made of, so that what is hashed is what is loaded.

A branch may move between the plan and the worker, or between two stages of one run.
"""

from __future__ import annotations

from typing import Literal, TypeVar

from align.recipe.digest import Digests
from align.recipe.env import resolve_env
from align.recipe.load import LoadedRecipe
from align.recipe.sources import base_folder
from align.spec.base import HubAdapter
from align.spec.data import DataSource, HubData
from align.spec.model import ModelSettings
from align.spec.stages import PolicyStage, Stage

S = TypeVar("S", bound=Stage)


class Pins:
    """Puts commits where a recipe has branches. Everything else stays as it is.

    Args:
        loaded: The recipe.
        digests: Asked after its fingerprints, so that the answers are theirs.
    """

    def __init__(self, loaded: LoadedRecipe, digests: Digests) -> None:
        self.loaded, self.digests = loaded, digests

    def model(self, model: ModelSettings) -> ModelSettings:
        """The model at the commit of its base."""
        if model.base in self.loaded.stages or base_folder(model.base, self.loaded.folder) is not None:
            return model
        return model.model_copy(update={"revision": self._commit("model", model.base, model.revision)})

    def source(self, source: DataSource) -> DataSource:
        """The entry of `data` at the commit of its data set."""
        if not isinstance(source, HubData):
            return source
        return source.model_copy(update={"revision": self._commit("dataset", source.hub, source.revision)})

    def stage(self, stage: S) -> S:
        """The stage with the adapter that it starts from at its commit."""
        policy = stage.policy if isinstance(stage, PolicyStage) else None
        if not isinstance(policy, HubAdapter) or base_folder(policy.adapter, self.loaded.folder) is not None:
            return stage
        commit = self._commit("model", policy.adapter, policy.revision)
        return stage.model_copy(update={"policy": policy.model_copy(update={"revision": commit})})

    def _commit(self, kind: Literal["model", "dataset"], name: str, revision: str | None) -> str:
        return self.digests.revision(kind, str(resolve_env(name)), revision)
