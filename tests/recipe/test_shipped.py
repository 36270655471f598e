"""No shipped recipe can rot: every one is read, checked as a graph, and survives being written out."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.recipe import build_graph, load_recipe
from align.recipe.document import dump
from align.recipe.rules import check_rules

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
shipped = pytest.mark.parametrize(
    "path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.relative_to(RECIPES).as_posix()
)


def test_the_quickstart_is_shipped() -> None:
    assert (RECIPES / "quickstart" / "sft_dpo.yaml").is_file()


@shipped
def test_reads_and_writes(path: Path, tmp_path: Path) -> None:
    loaded = load_recipe(path)
    written = dump(loaded.recipe.model_dump(mode="json", exclude_none=True))
    (tmp_path / path.name).write_text(written, encoding="utf-8")
    assert load_recipe(tmp_path / path.name).recipe == loaded.recipe


@shipped
def test_is_a_sound_graph(
    path: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "${env:ALIGN_DATA}" in path.read_text(encoding="utf-8"):
        monkeypatch.setenv("ALIGN_DATA", str(request.getfixturevalue("align_data")))
    graph = build_graph(load_recipe(path), tmp_path)
    check_rules(graph)
    assert set(graph.nodes) == set(load_recipe(path).recipe.stages)


@shipped
def test_explains_itself(path: Path) -> None:
    """A recipe is read by people first: a comment on top says what it shows, and its name is its own."""
    assert path.read_text(encoding="utf-8").startswith("# ")
    names = [load_recipe(other).recipe.name for other in RECIPES.rglob("*.yaml")]
    assert names.count(load_recipe(path).recipe.name) == 1
