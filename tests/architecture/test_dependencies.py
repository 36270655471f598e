"""What is imported is declared, what is optional is imported late, and the command line starts light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "trl",
    "accelerate",
    "numpy",
    "jinja2",
)
OPTIONAL = ("deepspeed", "trl")
BROUGHT_ALONG = {"pydantic_core"}  # the compiled half of pydantic, pinned by it
USED_BY_OTHERS = {"accelerate"}  # transformers' Trainer imports it; align names it in launch commands


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


def declared(project: dict[str, Any], *extras: str) -> dict[str, Requirement]:
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Every third-party import of a file: top-level name, line, and whether it runs when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        else:
            continue
        for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"align", "__future__"}:
            yield name, node.lineno, id(node) not in late


def test_every_import_is_declared(repository: Path, project: dict[str, Any]) -> None:
    known = declared(project, "deepspeed", "trl")
    owners = packages_distributions()
    undeclared = {
        f"{path.relative_to(repository)}:{line}": name
        for path in sorted((repository / "align").rglob("*.py"))
        for name, line, _ in imports(path)
        if name not in BROUGHT_ALONG
        and not {canonicalize_name(owner) for owner in owners.get(name, [name])} & set(known)
    }
    assert not undeclared, "add it to `dependencies` in pyproject.toml with its reason, or do without it"


def test_every_dependency_is_imported(repository: Path, project: dict[str, Any]) -> None:
    used = {name for path in (repository / "align").rglob("*.py") for name, _, _ in imports(path)}
    owners = packages_distributions()
    imported = {canonicalize_name(owner) for name in used for owner in owners.get(name, [name])}
    assert set(declared(project)) - imported - USED_BY_OTHERS == set()


def test_extras_are_imported_late(repository: Path) -> None:
    early = [
        f"{path.relative_to(repository)}:{line} {name}"
        for path in sorted((repository / "align").rglob("*.py"))
        for name, line, at_import in imports(path)
        if name in OPTIONAL and at_import
    ]
    assert early == []


def test_constraints_pin_what_is_declared(repository: Path, project: dict[str, Any]) -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (repository / "constraints.txt").read_text(), flags=re.MULTILINE))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    wanted = declared(project, "deepspeed", "trl", "dev")
    assert {name for name, need in wanted.items() if not need.specifier.contains(pins.get(name, "0"))} == set()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["align", *{arguments!r}]
from align.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("HEAVY", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["HEAVY"]
