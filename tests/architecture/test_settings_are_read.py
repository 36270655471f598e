"""No setting that is accepted and then ignored: every field of every settings class is read somewhere in align."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections import defaultdict
from pathlib import Path

import pytest

import align.methods
import align.spec
from align.spec.base import Settings


def settings_classes() -> list[type[Settings]]:
    for package in (align.spec, align.methods):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)

    def below(kind: type[Settings]) -> set[type[Settings]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    found = (kind for kind in below(Settings) if kind.__module__.startswith(("align.spec.", "align.methods.")))
    return sorted(found, key=lambda kind: (kind.__module__, kind.__qualname__))


@pytest.fixture(scope="module")
def reads(repository: Path) -> dict[str, list[tuple[Path, int]]]:
    """Attribute name -> the places in align where it is read (`something.name`)."""
    found: dict[str, list[tuple[Path, int]]] = defaultdict(list)
    for path in (repository / "align").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found[node.attr].append((path, node.lineno))
    return found


@pytest.mark.parametrize("kind", settings_classes(), ids=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
def test_every_field_is_read(kind: type[Settings], reads: dict[str, list[tuple[Path, int]]]) -> None:
    lines, first = inspect.getsourcelines(kind)
    own_file, own_lines = Path(inspect.getfile(kind)), range(first, first + len(lines))
    own_fields = set(kind.__annotations__) & set(kind.model_fields)
    unread = {
        field
        for field in own_fields
        if not any(path != own_file or line not in own_lines for path, line in reads[field])
    }
    assert not unread, f"{kind.__name__} accepts these and nothing uses them"
