from __future__ import annotations

import importlib.util

import pytest


@pytest.mark.parametrize(("folder", "made"), [("methods", "pages"), ("kinds", "kind_pages")])
def test_the_pages_are_current(folder, made, repository):
    """`python docs/generate.py` writes them from the docstrings."""
    spec = importlib.util.spec_from_file_location("generate", repository / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stored = {p.name: p.read_text() for p in (repository / "docs" / folder).glob("*.md")}
    assert stored == getattr(generate, made)()
