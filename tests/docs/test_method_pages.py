from __future__ import annotations

import importlib.util


def test_the_method_pages_are_current(repository):
    """`python docs/generate.py` writes them from the docstrings."""
    spec = importlib.util.spec_from_file_location("generate", repository / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stored = {p.name: p.read_text() for p in (repository / "docs" / "methods").glob("*.md")}
    assert stored == generate.pages()
