"""align: one YAML recipe in; an aligned language model and an honest comparison of how it got there out.

    import align

    recipe = align.load("recipes/quickstart/sft_dpo.yaml")
    print(recipe.plan())
    result = recipe.run()
    print(result.results()["comparison"]["candidates"]["dpo"]["gold"])

Importing align imports nothing heavy; its functions do when they are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from align.runner.api import Recipe
    from align.runner.run import RunResult

__version__ = "0.1.0"

__all__ = ["__version__", "load", "run"]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: The YAML file.
        overrides: `a.b=c`, as `--set` takes them.

    Raises:
        align.errors.RecipeError: What is wrong, where, and how to mend it.
        align.errors.DataError: A data file cannot be read.
    """
    from align.runner.api import Recipe

    return Recipe(path, overrides)


def run(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    until: str | None = None,
    from_: str | None = None,
    allow_code: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Run a recipe: stages that the store has are reused, an interrupted one resumes.

    Args:
        path: The YAML file.
        overrides: `a.b=c`, as `--set` takes them.
        until: Stop after this stage.
        from_: Make this stage and all that follow from it again.
        allow_code: Whether functions of your own that the recipe names may run.
        console: Where progress goes; `Console(quiet=True)` for silence.

    Raises:
        align.errors.AlignError: Of the kind that ended the run.
    """
    from align.runner.run import run_recipe

    return run_recipe(path, overrides, until=until, from_=from_, allow_code=allow_code, console=console)
