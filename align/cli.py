"""The command line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from align.errors import AlignError

if TYPE_CHECKING:
    from rich.console import Console

    from align.runner.inspect import View

PIPE_WIDTH = 120
"""Columns of tables that go to a file or a pipe."""


class _Group(TyperGroup):
    """Tells a user's error in plain words on stderr, with its exit code; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AlignError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


def _app(**settings: Any) -> typer.Typer:
    return typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


app = _app(cls=_Group, help="One YAML recipe in; an aligned model and an honest comparison of how it got there out.")
data_app = _app(help="Look at the data of a recipe as training will see it.")
app.add_typer(data_app, name="data")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value; may be repeated.")
]
DataName = Annotated[str, typer.Argument(metavar="DATA", help="An entry of the recipe's data.", show_default=False)]
StageName = Annotated[str | None, typer.Option("--stage", metavar="STAGE", help="Read it as this stage does.")]
Rows = Annotated[int, typer.Option("--rows", min=1, help="How many rows.")]


def _console() -> Console:
    from rich.console import Console

    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(width=wide)


def _version(wanted: bool) -> None:
    if wanted:
        from align import __version__

        typer.echo(f"align {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Tell the version.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Make this stage and what follows from it again.")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run Python functions that the recipe names.")
    ] = False,
) -> None:
    """Run a recipe. What is finished is reused, what was interrupted resumes."""
    from align.runner.run import run_recipe

    run_recipe(recipe, overrides or (), until=until, from_=from_, allow_code=allow_code, console=_console())


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe without running anything."""
    from align.runner.api import Recipe

    checked = Recipe(recipe, overrides or ())
    typer.echo(f"{recipe} is sound: {', '.join(checked.stages)}")
    for name, reason in checked.graph.unresolved.items():
        typer.echo(f"not looked up: {name} ({reason})")


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also count tokens and truncation (slower).")] = False,
) -> None:
    """Show what would run, what is reused, and what it takes."""
    from align.artifacts.store import Store
    from align.recipe.plan_table import plan_table
    from align.runner.api import Recipe
    from align.runner.inspect import count_tokens
    from align.runner.tables import tokens_table

    checked, console = Recipe(recipe, overrides or ()), _console()
    console.print(plan_table(checked.plan()))
    if tokens:
        console.print(tokens_table(count_tokens(checked.graph, Store().home)))


@app.command()
def status(recipe: RecipePath) -> None:
    """Show how far the last run of a recipe in this folder is."""
    from align.recipe import load_recipe
    from align.runner.folder import RunFolder
    from align.runner.status import read_run
    from align.runner.tables import status_table

    folder = RunFolder.of(load_recipe(recipe).recipe.name)
    _console().print(status_table(read_run(folder)))


@app.command()
def results(
    recipe: RecipePath,
    as_json: Annotated[bool, typer.Option("--json", help="Candidates and their intervals as JSON.")] = False,
    stage: Annotated[str | None, typer.Option("--stage", metavar="STAGE", help="Which comparison, of several.")] = None,
) -> None:
    """Show what the comparison of the last run in this folder found, and how good its reward models are."""
    from align.recipe import load_recipe
    from align.report.table import results_table, rewards_table
    from align.runner.folder import RunFolder
    from align.runner.results import one_comparison, run_evaluations, run_results

    folder = RunFolder.of(load_recipe(recipe).recipe.name)
    rewards = run_evaluations(folder) if stage is None else {}
    alone = bool(rewards) and not run_results(folder)  # a recipe may end with a reward model
    found = {} if alone else one_comparison(folder, stage)
    if as_json:
        candidates = {} if alone else {"candidates": found["candidates"]}
        typer.echo(json.dumps(candidates | ({"rewards": rewards} if rewards else {}), indent=2))
        return
    if rewards:
        _console().print(rewards_table(rewards))
    if found:
        _console().print(results_table(found))


@app.command()
def methods() -> None:
    """List the training methods."""
    from align.runner.tables import methods_table

    _console().print(methods_table())


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from align.recipe.schema import recipe_model

    typer.echo(json.dumps(recipe_model().model_json_schema(), indent=2))


@app.command()
def gc(
    recipes: Annotated[
        list[Path] | None, typer.Argument(metavar="[RECIPE]...", help="Also keep what these make.", show_default=False)
    ] = None,
    references: Annotated[
        bool, typer.Option("--references", help="Also drop all reference log-probs; runs compute them again.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
) -> None:
    """Remove artifacts that no run folder and no given recipe points to."""
    from align.runner.collect import collect

    collect(recipes or (), console=_console(), references=references, dry_run=dry_run)


@app.command()
def doctor() -> None:
    """Check this machine: packages, devices, memory, disk."""
    from align.runner.doctor import examine

    examine(_console())


def _show(view: View, recipe: Path, name: str, stage: str | None, overrides: list[str] | None, rows: int = 3) -> None:
    from align.artifacts.store import Store
    from align.runner.api import Recipe
    from align.runner.inspect import show_data

    graph = Recipe(recipe, overrides or ()).graph
    raise typer.Exit(show_data(view, graph, name, home=Store().home, stage=stage, rows=rows))


@data_app.command("preview")
def data_preview(
    recipe: RecipePath, name: DataName, stage: StageName = None, rows: Rows = 3, overrides: Overrides = None
) -> None:
    """Show rows as records."""
    _show("preview", recipe, name, stage, overrides, rows)


@data_app.command("mask")
def data_mask(
    recipe: RecipePath, name: DataName, stage: StageName = None, rows: Rows = 3, overrides: Overrides = None
) -> None:
    """Show which tokens are trained."""
    _show("mask", recipe, name, stage, overrides, rows)


@data_app.command("check")
def data_check(recipe: RecipePath, name: DataName, stage: StageName = None, overrides: Overrides = None) -> None:
    """Count malformed, dropped and truncated rows, and prompts that other data has as well."""
    _show("check", recipe, name, stage, overrides)


def main() -> None:
    """Entry point of the command `align`."""
    app()


if __name__ == "__main__":
    main()
