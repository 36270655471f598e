"""What a recipe names outside itself: data files, generators and other plug-ins, model folders, variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from align.errors import DataError, LaunchError, RecipeError
from align.recipe.digest import Digests
from align.recipe.env import is_malformed, resolve_env, variables
from align.recipe.load import LoadedRecipe
from align.recipe.origins import Loc
from align.recipe.references import references
from align.recipe.suggest import did_you_mean
from align.recipe.validate import validate
from align.spec.base import CodeRef, Registered
from align.spec.data import FIELDS_OF_FORMAT, FILE_KINDS, DataSource, FileData, GeneratedData


def base_folder(name: str, folder: Path) -> Path | None:
    """The folder that a model's name refers to, from the recipe's folder or the current one; None for a Hub name."""
    name = str(resolve_env(name))
    return next((each for each in (folder / name, Path(name)) if _is("dir", each)), None)


def _is(kind: Literal["file", "dir"], path: Path) -> bool:
    """Whether the path is one; a name that no file can have, or that is out of reach, is none."""
    try:
        return path.is_file() if kind == "file" else path.is_dir()
    except (OSError, ValueError):
        return False


@cache
def plugins(group: str) -> dict[str, EntryPoint]:
    """What is registered in an entry point group, by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=group), key=lambda entry: entry.name)}


def plugin(group: str, name: str) -> Any:
    """A registered object.

    Raises:
        LaunchError: It cannot be imported.
    """
    entry = plugins(group)[name]
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise LaunchError(
            f"{group} `{name}` ({entry.value}) cannot be imported: {error}",
            fix="install what it needs, or reinstall the package that registers it",
        ) from error


def plugin_version(group: str, name: str) -> Any:
    """The `version` that a plug-in declares; None if it declares none."""
    return getattr(plugin(group, name), "version", None)


class Sources:
    """Checks and finds what a recipe names outside itself."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        self.loaded = loaded

    def path(self, source: FileData) -> Path:
        """The file of a data entry."""
        return self.loaded.folder / str(resolve_env(source.path))

    def digest(self, name: str, digests: Digests) -> str:
        """Digest of the content of a file entry.

        Raises:
            DataError: The file cannot be read.
        """
        source = self.loaded.recipe.data[name]
        assert isinstance(source, FileData)
        try:
            return digests.file(self.path(source))
        except OSError as error:
            raise DataError(
                f"{self.path(source)} cannot be read: {error.strerror}",
                where=self.loaded.where("data", name, "path"),
                fix="make the file readable",
            ) from error

    def code(self, spec: str) -> tuple[Path, str]:
        """The file and the name of a `file.py:function`."""
        path, _, function = spec.rpartition(":")
        return self.loaded.folder / str(resolve_env(path)), function

    def check(self) -> Iterator[RecipeError]:
        """Everything outside that is not there."""
        yield from self._plugins()
        yield from self._functions()
        for name, source in self.loaded.recipe.data.items():
            yield from self._columns(name, source)
            if isinstance(source, FileData):
                yield from self._file(name, source)
            elif isinstance(source, GeneratedData) and source.generator in plugins("align.generators"):
                yield from self._generator(name, source)

    def variables(self) -> Iterator[RecipeError]:
        """Every `${env:NAME}` that is not set, or malformed."""
        yield from self._variables(self.loaded.recipe.model_dump(), ())

    def _variables(self, value: Any, loc: Loc) -> Iterator[RecipeError]:
        if isinstance(value, dict | list):
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                yield from self._variables(each, (*loc, key))
        elif is_malformed(value):
            yield self._error(loc, f"{value!r} has a variable that is not closed", "write ${env:NAME}")
        else:
            for name in variables(value):
                if name not in os.environ:
                    yield self._error(loc, f"the environment variable {name} is not set", f"export {name}=...")

    def _plugins(self) -> Iterator[RecipeError]:
        for loc, reference in references_in(self.loaded):
            if isinstance(reference.mark, Registered) and reference.name not in plugins(reference.mark.group):
                known = plugins(reference.mark.group)
                yield self._error(
                    loc,
                    f"nothing is registered as `{reference.name}` in {reference.mark.group}"
                    + did_you_mean(reference.name, known),
                    f"one of: {', '.join(known) or 'none is installed'}",
                )

    def _functions(self) -> Iterator[RecipeError]:
        """Files of the user's that are not there. What is in them is looked at when they are run, and not before."""
        for loc, reference in references_in(self.loaded):
            if not isinstance(reference.mark, CodeRef):
                continue
            path, function = self.code(reference.name)
            if path.suffix != ".py" or not function.isidentifier():
                yield self._error(
                    loc, f"`{reference.name}` names no function", "write file.py:function, relative to the recipe"
                )
            elif not _is("file", path):
                yield self._missing_file(loc, path, reference.name.rpartition(":")[0])

    def _missing_file(self, loc: Loc, path: Path, written: str) -> RecipeError:
        beside = [each.name for each in path.parent.iterdir()] if _is("dir", path.parent) else []
        fix = f"paths start at {self.loaded.path.parent}/"
        return self._error(loc, f"there is no file {written}{did_you_mean(path.name, beside)}", fix)

    def _columns(self, entry: str, source: DataSource) -> Iterator[RecipeError]:
        known = FIELDS_OF_FORMAT[source.format].names
        for name in source.columns:
            if name not in known:
                yield self._error(
                    ("data", entry, "columns", name),
                    f"format {source.format} has no field `{name}`{did_you_mean(name, known)}",
                    f"its fields: {', '.join(known)}",
                )

    def _file(self, entry: str, source: FileData) -> Iterator[RecipeError]:
        path, loc = self.path(source), ("data", entry, "path")
        if _is("dir", path):
            yield self._error(loc, f"{source.path} is a folder", "name a file in it")
        elif Path(path.name.lower().removesuffix(".gz")).suffix not in FILE_KINDS:
            fix = f"name it {', '.join(FILE_KINDS)} (or any of these .gz)"
            yield self._error(loc, f"nothing reads a file that is called {source.path}", fix)
        elif not _is("file", path):
            yield self._missing_file(loc, path, source.path)

    def _generator(self, name: str, source: GeneratedData) -> Iterator[RecipeError]:
        """Asks the generator itself: its parts, the format of its rows, its options."""
        kind = plugin("align.generators", source.generator)
        parts = getattr(kind, "parts", None)
        if isinstance(parts, dict) and source.part not in parts:
            fix = f"one of: {', '.join(parts)}"
            hint = did_you_mean(source.part, parts)
            yield self._error(("data", name, "part"), f"{source.generator} has no part `{source.part}`{hint}", fix)
            return
        if isinstance(parts, dict) and parts[source.part] != source.format:
            yield self._error(
                ("data", name, "format"),
                f"rows of part `{source.part}` have the format {parts[source.part]}, not {source.format}",
                f"write format: {parts[source.part]}",
            )
            return
        described = getattr(kind, "Options", None)
        if isinstance(described, type) and issubclass(described, BaseModel):
            try:
                validate(described, source.options, self.loaded.origins, ("data", name, "options"))
            except RecipeError as error:
                yield error
                return
        if complaint := _complaint(kind, source, source.options):
            loc: Loc = ("data", name, "rows")
            if source.options and _complaint(kind, source, {}) is None:
                alone = [key for key, value in source.options.items() if _complaint(kind, source, {key: value})]
                loc = ("data", name, "options", *alone[:1])
            yield self._error(loc, complaint.message, complaint.fix or "see the generator's documentation")

    def _error(self, loc: Loc, message: str, fix: str) -> RecipeError:
        return RecipeError(message, where=self.loaded.where(*loc), fix=fix)


def references_in(loaded: LoadedRecipe) -> Iterator[tuple[Loc, Any]]:
    """Every reference of a recipe with its place in it."""
    for part in ("data", "stages"):
        for name, settings in getattr(loaded.recipe, part).items():
            for reference in references(settings):
                yield (part, name, *reference.loc), reference


def _complaint(kind: Any, source: GeneratedData, options: dict[str, Any]) -> RecipeError | None:
    """What a generator says of these options before it makes a row."""
    try:
        kind().generate(source.part, source.rows, source.seed, options)
    except RecipeError as error:
        return error
    except (ValueError, TypeError) as error:
        return RecipeError(f"{source.generator}: {error}")
    return None
