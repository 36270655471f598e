"""Recipes written on the spot, checked as `align check` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from align.recipe import Graph, build_graph, load_recipe

Check = Callable[..., Graph]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Write a recipe and its data files, and make its graph; raises what a user would see."""

    def make(text: str, *overrides: str, **files: str) -> Graph:
        for name, content in ({"pairs": "{}\n", "rows": "{}\n"} | files).items():
            (tmp_path / f"{name}.jsonl").write_text(content)
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return build_graph(load_recipe(path, overrides), tmp_path / "home")

    return make


@pytest.fixture
def refuse(check: Check) -> Callable[..., str]:
    """Check a recipe that is wrong; the message, with the folder left out of its places."""
    from align.errors import RecipeError

    def told(text: str, *overrides: str) -> str:
        with pytest.raises(RecipeError) as caught:
            check(text, *overrides)
        assert caught.value.exit_code == 2
        message = str(caught.value)
        for word in ("pydantic", "Input should", "Extra inputs", "Field required", "literal[", "union", "NoneType"):
            assert word not in message, message
        return "\n".join(line.partition("recipe.yaml:")[2] or line for line in message.splitlines())

    return told
