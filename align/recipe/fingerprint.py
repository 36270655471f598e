"""The fingerprint of a stage: SHA-256 of the canonical JSON of everything that can change its result.

Defaults are filled in, so that writing one out changes nothing; cosmetic fields, names of stages and of data entries
are left out; what a reference names stands in its place.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import to_jsonable_python

from align.recipe.digest import Digests, digest_of
from align.recipe.load import LoadedRecipe
from align.recipe.references import item_annotation, mark_of
from align.recipe.shape import annotation_of
from align.recipe.sources import Sources, base_folder, plugin_version
from align.spec.base import DataRef, HubAdapter, Registered, Settings, StageRef
from align.spec.data import FileData, HubData
from align.spec.model import ModelSettings
from align.spec.stages import Stage

CANONICAL_VERSION = 1
"""Raised when the way fingerprints are made changes: every stored result is then made anew."""


class Fingerprints:
    """Makes fingerprints in topological order.

    Args:
        loaded: The recipe.
        sources: Where its data lies.
        digests: Of what lies outside the recipe.
    """

    def __init__(self, loaded: LoadedRecipe, sources: Sources, digests: Digests) -> None:
        self.loaded, self.sources, self.digests = loaded, sources, digests
        self.known: dict[str, str] = {}

    def add(self, name: str, stage: Stage, model: ModelSettings | None) -> str:
        """The fingerprint of a stage whose parents have theirs."""
        # A comparison shows its candidates under their names: renaming one makes another result.
        named = stage.produces == "comparison"
        settings = self._settings(stage, named, without={"kind", "model"})
        self.known[name] = digest_of(
            {
                "canonical": CANONICAL_VERSION,
                "kind": type(stage).model_fields["kind"].default,
                "version": type(stage).version,
                "settings": settings,
                "model": None if model is None else self._model(model),
            }
        )
        return self.known[name]

    def _settings(self, settings: Settings, named: bool, without: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
        plain = {}
        for name, info in type(settings).model_fields.items():
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            if name in without or extra.get("cosmetic"):
                continue
            value = self._plain(getattr(settings, name), annotation_of(info), named)
            plain[name] = sorted(value) if extra.get("unordered") and isinstance(value, list) else value
        return plain

    def _plain(self, value: Any, annotation: Any, named: bool) -> Any:
        if isinstance(value, HubAdapter):
            return {"adapter": self._folder_or_hub(value.adapter, None)}
        if isinstance(value, Settings):
            return self._settings(value, named)
        if isinstance(value, list):
            return [self._plain(each, item_annotation(annotation, list), named) for each in value]
        if isinstance(value, dict):
            return {key: self._plain(each, item_annotation(annotation, dict), named) for key, each in value.items()}
        mark = mark_of(value, annotation)
        if isinstance(mark, StageRef):
            return {"stage": self.known[value]} | ({"name": value} if named else {})
        if isinstance(mark, DataRef):
            return self._data(value)
        if isinstance(mark, Registered):
            return {"name": value, "version": plugin_version(mark.group, value)}
        return to_jsonable_python(value)

    def _data(self, name: str) -> dict[str, Any]:
        source = self.loaded.recipe.data[name]
        plain = self._settings(source, named=False)
        if isinstance(source, FileData):
            # The ending decides how the bytes are read.
            path = self.sources.path(source)
            return plain | {"sha256": self.sources.digest(name, self.digests), "ending": "".join(path.suffixes[-2:])}
        if isinstance(source, HubData):
            plain |= {"hub": self.digests.hub("dataset", source.hub, source.revision), "revision": None}
        return plain

    def _model(self, model: ModelSettings) -> dict[str, Any]:
        return self._settings(model, named=False, without={"revision"}) | {
            "base": self.known.get(model.base) or self._folder_or_hub(model.base, model.revision)
        }

    def _folder_or_hub(self, name: str, revision: str | None) -> str:
        folder = base_folder(name, self.loaded.folder)
        return self.digests.hub("model", name, revision) if folder is None else self.digests.folder(folder)
