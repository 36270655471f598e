from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from align.artifacts.store import Store
from align.recipe import Graph
from align.runner.collect import collect
from align.runner.run import run_recipe

QUIET = Console(quiet=True)


@pytest.fixture
def stored(finish, graph: Graph, align_home: Path):
    """The names of the stages whose artifacts are in the store; all of them at first."""
    for name in graph.nodes:
        finish(name)
    return lambda: {name for name, node in graph.nodes.items() if Store(align_home).find(node.fingerprint)}


ALL = {"base", "sft", "comparison"}


def test_what_a_run_points_to_is_kept_wherever_it_ran(
    recipe: Path, stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(recipe, console=QUIET)
    monkeypatch.chdir(tmp_path)
    assert collect([], console=QUIET) == []
    assert stored() == ALL


def test_what_nobody_points_to_goes(stored) -> None:
    assert {each.what for each in collect([], console=QUIET)} == {"artifact"}
    assert stored() == set()


def test_a_deleted_run_folder_keeps_nothing(recipe: Path, stored) -> None:
    shutil.rmtree(run_recipe(recipe, console=QUIET).folder)
    collect([], console=QUIET)
    assert stored() == set()


def test_what_given_recipes_make_is_kept(recipe: Path, stored) -> None:
    assert collect([recipe], console=QUIET) == []
    assert stored() == ALL


def test_an_unfinished_stage_of_a_run_is_kept(recipe: Path, graph: Graph, finish, align_home: Path) -> None:
    finish("base")
    run_recipe(recipe, until="base", console=QUIET)
    folder = Path("runs/demo/status.json")
    fingerprint = graph.nodes["sft"].fingerprint
    folder.write_text(folder.read_text().replace(graph.nodes["base"].fingerprint, fingerprint))
    work = Store(align_home).work(fingerprint)
    (work / "checkpoint").touch()
    collect([], console=QUIET)
    assert (work / "checkpoint").exists()


def test_a_dry_run_only_tells(stored) -> None:
    console = Console(record=True, width=200)
    removed = collect([], console=console, dry_run=True)
    assert len(removed) == 3
    assert stored() == ALL
    text = console.export_text()
    assert all(str(each.path) in text for each in removed)
    assert text.rstrip().endswith("would be freed")
