"""The fingerprint of a stage: SHA-256 of the canonical JSON of everything that can change its result.

Defaults are filled in, so that writing one out changes nothing; cosmetic fields, names of stages and of data entries
are left out; what a reference names stands in its place.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic_core import to_jsonable_python

from align.errors import RecipeError
from align.recipe.digest import Digests, digest_of
from align.recipe.env import resolve_env
from align.recipe.lineage import model_loc
from align.recipe.load import LoadedRecipe
from align.recipe.made import makers
from align.recipe.origins import Loc
from align.recipe.references import item_annotation, mark_of
from align.recipe.shape import annotation_of
from align.recipe.sources import Sources, base_folder, plugin_version
from align.spec.base import CodeRef, DataRef, HubAdapter, Registered, Settings, StageRef
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
        self.makers = makers(loaded.stages)

    def add(self, name: str, stage: Stage, model: ModelSettings | None) -> str:
        """The fingerprint of a stage whose parents have theirs."""
        self.known[name] = digest_of(
            {
                "canonical": CANONICAL_VERSION,
                "kind": type(stage).model_fields["kind"].default,
                "version": type(stage).version,
                "settings": self._settings(stage, ("stages", name), without=("kind", "model")),
                "model": None if model is None else self._model(name, model),
            }
        )
        return self.known[name]

    def _settings(self, settings: Settings, loc: Loc, without: tuple[str, ...] = ()) -> dict[str, Any]:
        plain = {}
        for name, info in type(settings).model_fields.items():
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            if name in without or extra.get("cosmetic"):
                continue
            if extra.get("added") and getattr(settings, name) == info.default:
                continue
            value = self._plain(getattr(settings, name), annotation_of(info), (*loc, name))
            plain[name] = sorted(value) if extra.get("unordered") and isinstance(value, list) else value
        return plain

    def _plain(self, value: Any, annotation: Any, loc: Loc) -> Any:
        if isinstance(value, HubAdapter):
            return {"adapter": self._folder_or_hub(value.adapter, value.revision, (*loc, "adapter"))}
        if isinstance(value, Settings):
            return self._settings(value, loc)
        if isinstance(value, list):
            items = item_annotation(annotation, list)
            return [self._plain(each, items, (*loc, i)) for i, each in enumerate(value)]
        if isinstance(value, dict):
            items = item_annotation(annotation, dict)
            return {key: self._plain(each, items, (*loc, key)) for key, each in value.items()}
        mark = mark_of(value, annotation)
        if isinstance(mark, StageRef):
            # A comparison shows its candidates under their names: renaming one makes another result.
            shows_names = self.loaded.stages[str(loc[1])].shows_names
            return {"stage": self.known[value]} | ({"name": value} if shows_names else {})
        if isinstance(mark, DataRef) and value in self.makers:
            return {"stage": self.known[value]}
        if isinstance(mark, DataRef):
            return self._data(value)
        if isinstance(mark, Registered):
            return {"name": value, "version": plugin_version(mark.group, value)}
        if isinstance(mark, CodeRef):
            path, function = self.sources.code(value)
            return {"function": function, "sha256": self.digests.file(path)}
        return to_jsonable_python(value)

    def _data(self, name: str) -> dict[str, Any]:
        source = self.loaded.recipe.data[name]
        plain = self._settings(source, ("data", name))
        if isinstance(source, FileData):
            # The ending decides how the bytes are read.
            path = self.sources.path(source)
            return plain | {"sha256": self.sources.digest(name, self.digests), "ending": "".join(path.suffixes[-2:])}
        if isinstance(source, HubData):
            commit = self._hub("dataset", source.hub, source.revision, ("data", name, "hub"))
            plain |= {"hub": commit, "revision": None}
        return plain

    def _model(self, name: str, model: ModelSettings) -> dict[str, Any]:
        base = self.known.get(model.base)
        if base is None:
            base = self._folder_or_hub(model.base, model.revision, model_loc(self.loaded, name, "base"))
        return self._settings(model, ("stages", name, "model"), without=("revision",)) | {"base": base}

    def _folder_or_hub(self, name: str, revision: str | None, loc: Loc) -> str:
        folder = base_folder(name, self.loaded.folder)
        return self._hub("model", name, revision, loc) if folder is None else self.digests.folder(folder)

    def _hub(self, kind: Literal["model", "dataset"], name: str, revision: str | None, loc: Loc) -> str:
        try:
            return self.digests.hub(kind, str(resolve_env(name)), revision)
        except LookupError as error:
            raise RecipeError(
                f"the Hub has no {kind} `{name}`" + (f" at {revision}" if revision else "") + f": {error}",
                where=self.loaded.where(*loc),
                fix="check the name and the revision; a private one needs HF_TOKEN",
            ) from error
