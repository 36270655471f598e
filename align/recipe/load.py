"""A recipe file, its overrides applied, checked against the schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.errors import RecipeError
from align.recipe.document import MAX_BYTES, parse
from align.recipe.origins import Origins
from align.recipe.overrides import apply_override
from align.recipe.schema import RecipeBase, recipe_model
from align.recipe.suggest import did_you_mean
from align.recipe.validate import validate
from align.spec.stages import Stage


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where every part of it was written.

    Attributes:
        recipe: The settings; secrets are still `${env:NAME}`.
        path: The file.
        origins: Lines and overrides.
    """

    recipe: RecipeBase
    path: Path
    origins: Origins

    @property
    def folder(self) -> Path:
        """Where relative paths of the recipe start."""
        return self.path.resolve().parent

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages by name, in the order of the file; each an object of its kind's class."""
        return self.recipe.stages  # type: ignore[attr-defined, no-any-return]

    def where(self, *loc: str | int) -> str:
        """``recipes/x.yaml:12: stages.dpo.beta``, or ``--set stages.dpo.beta=c`` where an override wrote it."""
        return self.origins.where(loc)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check a recipe.

    Args:
        path: A YAML file.
        overrides: ``a.b=c`` each, as given to ``--set``; later ones win.

    Raises:
        RecipeError: The file cannot be read, is not YAML, or says something that no recipe may say.
    """
    document = parse(_read(Path(path)), str(path))
    origins = Origins(str(path), document.lines)
    data = document.data
    if not isinstance(data, dict):
        what = "the recipe is empty" if data is None else f"the recipe is a {type(data).__name__}, not a mapping"
        raise RecipeError(what, where=f"{path}:1", fix="start with `name:` and `stages:`; see recipes/ for examples")
    for text in overrides:
        apply_override(data, text, origins)
    return LoadedRecipe(validate(recipe_model(), data, origins), Path(path), origins)


def _read(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise RecipeError(
                f"{path.stat().st_size / 1e6:.0f} MB is no recipe",
                where=str(path),
                fix="give the YAML file of a recipe",
            )
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"byte 0x{error.object[error.start]:02x} is not UTF-8", where=f"{path}:{line}", fix="save the file as UTF-8"
        ) from None
    except FileNotFoundError:
        near = [each.name for each in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near)
        raise RecipeError(f"there is no such file{hint}", where=str(path), fix="give the path of a recipe") from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path), fix="give a readable file") from None
