"""The rules of the house: layers, sizes, and what no file may hold. `make lint` checks style and types."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FILE_LINES = 450  # guides, with some slack: 400
METHOD_FILE_LINES = 140  # 120
FUNCTION_LINES = 80  # 60

UNSAFE = re.compile(
    r"shell=True|yaml\.(unsafe_)?load\(|pickle\.loads?\b|weights_only=False|trust_remote_code=True|os\.system\("
)
# One machine's folders, and words that mean nothing to a reader of this repository.
FOREIGN = re.compile(
    r"(^|[^\w.])/(work|root|home)/|/tmp/\w+/|shared/design|\b[Ii]ssue #?\d+|\b[Ss]ub-?agent|\bworkplace\b"
)


def sources(repository: Path) -> list[Path]:
    return sorted((repository / "align").rglob("*.py"))


def tracked(repository: Path) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = (repository / name for name in listed.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file() and path != Path(__file__)]


def hits(paths: list[Path], pattern: re.Pattern[str], repository: Path) -> Iterator[str]:
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), start=1):
            if pattern.search(line):
                yield f"{path.relative_to(repository)}:{number}: {line.strip()[:100]}"


def test_layers(repository: Path) -> None:
    # In a process of its own: import-linter reconfigures logging and silences every logger there is.
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True, no_logo=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_stay_small(repository: Path) -> None:
    methods = repository / "align" / "methods"
    too_long = {}
    for path in sources(repository):
        limit = METHOD_FILE_LINES if path.parent == methods and path.stem not in ("__init__", "ops") else FILE_LINES
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > limit:
            too_long[str(path.relative_to(repository))] = f"{lines} > {limit}"
    assert not too_long, "split it so that a concept goes, not only lines"


def test_functions_stay_small(repository: Path) -> None:
    too_long = {}
    for path in sources(repository):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    too_long[f"{path.relative_to(repository)}:{node.lineno} {node.name}"] = lines
    assert not too_long


def test_nothing_unsafe(repository: Path) -> None:
    assert list(hits(sources(repository), UNSAFE, repository)) == []


def test_the_repository_speaks_of_the_project_alone(repository: Path) -> None:
    assert list(hits(tracked(repository), FOREIGN, repository)) == []


def test_no_data_and_no_weights_are_tracked(repository: Path) -> None:
    heavy = [str(path.relative_to(repository)) for path in tracked(repository) if path.stat().st_size > 500_000]
    assert heavy == []
