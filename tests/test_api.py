from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import align
from align.errors import RecipeError
from align.runner.run import run_recipe

RECIPE = """
name: demo
data:
  corpus: {generator: film-reviews, part: corpus, rows: 8, format: prompt_completion}
stages:
  base: {kind: pretrain, data: corpus}
"""


@pytest.fixture
def recipe(tmp_path: Path, align_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "demo.yaml"
    path.write_text(RECIPE)
    return path


def test_the_public_face() -> None:
    """A name that is added or lost here is a decision, not an accident."""
    assert set(align.__all__) == {"__version__", "load", "run"}
    assert all(hasattr(align, name) for name in align.__all__)


def test_importing_align_is_free() -> None:
    code = "import sys, align; print(*sorted({'torch', 'pydantic', 'rich', 'yaml', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_run_is_run_recipe() -> None:
    assert list(inspect.signature(align.run).parameters) == list(inspect.signature(run_recipe).parameters)


def test_load_gives_a_checked_recipe(recipe: Path) -> None:
    loaded = align.load(recipe, ["stages.base.train.seed=3"])
    assert (loaded.name, loaded.stages) == ("demo", ["base"])
    assert loaded.loaded.recipe.stages["base"].train.seed == 3
    assert loaded.results() == {}
    assert repr(loaded) == f"Recipe({str(recipe)!r}: base)"


def test_a_plan_touches_nothing(recipe: Path, align_home: Path) -> None:
    plan = align.load(recipe).plan()
    assert [row.stage for row in plan.rows] == ["base"]
    assert not (align_home / "artifacts").exists()
    assert not Path("runs").exists()


def test_a_wrong_recipe_is_an_exception(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("kind: pretrain", "kind: pretrian"))
    with pytest.raises(RecipeError, match="did you mean"):
        align.load(recipe)
