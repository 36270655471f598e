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


@pytest.fixture
def rows(recipe: Path, stored, graph: Graph, align_home: Path) -> Path:
    """Reference log-probabilities of the policy `sft`."""
    from align.artifacts.reference import PolicyKey

    store, owner = Store(align_home), graph.nodes["sft"].fingerprint
    key = PolicyKey(base="b", quantization="none", dtype="float32", adapter="a", tokenizer="t")
    folder = store.references.open(key, owner, {store.folder(owner).name: store.folder(owner)})
    (folder / "rows-1.safetensors").write_bytes(b"x" * 3_000_000)
    return folder


def collected(*arguments: object, **options: bool) -> str:
    console = Console(record=True, width=200)
    collect(*arguments, console=console, **options)
    return console.export_text()


def test_reference_log_probs_stay_with_their_policy_and_are_told(recipe: Path, rows: Path) -> None:
    text = collected([recipe])
    assert text.splitlines() == ["3.0 MB of reference log-probs stay (--references drops them)", "0 bytes freed"]
    assert rows.is_dir()


def test_they_go_on_request(recipe: Path, rows: Path, stored) -> None:
    assert "would be freed" in collected([recipe], references=True, dry_run=True)
    assert rows.is_dir()
    text = collected([recipe], references=True)
    assert [line.split()[0] for line in text.splitlines()] == ["reference", "3.0"]
    assert not rows.exists()
    assert stored() == ALL


def test_they_go_with_their_policy(rows: Path) -> None:
    kinds = [line.split()[0] for line in collected([]).splitlines()]
    assert kinds == ["artifact", "artifact", "artifact", "reference", "3.0"]
    assert not rows.exists()
