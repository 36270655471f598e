from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from align import __version__
from align.cli import app
from align.errors import DataError, LaunchError, RecipeError, TrainingError
from align.methods import all_methods

RECIPE = """
name: demo
model: {base: base, adapter: {kind: lora, rank: 4, alpha: 8}}
data:
  corpus: {generator: film-reviews, part: corpus, rows: 40, format: prompt_completion}
  rows: {generator: film-reviews, part: demonstrations, rows: 20, format: prompt_completion}
stages:
  base: {kind: pretrain, data: corpus, tokenizer: {vocab_size: 300}}
  sft: {kind: sft, data: rows}
"""

COMMANDS = ["run", "check", "plan", "status", "results", "methods", "schema", "gc", "doctor", "data"]


@pytest.fixture
def recipe(tmp_path: Path, align_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "demo.yaml"
    path.write_text(RECIPE)
    return path


def align(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    argv = [sys.executable, "-m", "align", *map(str, arguments)]
    return subprocess.run(argv, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False)


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = command("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
    assert min(seconds) < 0.5


def test_help_names_every_command() -> None:
    text = align("--help").output
    assert [name for name in COMMANDS if not re.search(rf"\b{name}\b", text)] == []


def test_version() -> None:
    assert align("--version").output == f"align {__version__}\n"


def test_the_installed_command() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("align"), "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"align {__version__}\n")


def test_check_a_sound_recipe(recipe: Path) -> None:
    done = align("check", recipe)
    assert (done.exit_code, done.output) == (0, f"{recipe} is sound: base, sft\n")


def test_a_wrong_recipe_costs_a_second_and_names_the_line(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("data: rows", "data: rws"))
    done = command("check", recipe)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {recipe}:9: stages.sft.data: ")
    assert "did you mean `rows`?" in done.stderr
    assert "\n  fix: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["run", "check", "plan", "status", "results"])
def test_every_command_on_a_recipe_tells_a_missing_file(recipe: Path, name: str) -> None:
    done = align(name, "demo.yml")
    assert done.exit_code == 2
    assert "error: demo.yml: there is no such file; did you mean `demo.yaml`?" in done.stderr


@pytest.mark.parametrize("kind", [RecipeError, DataError, LaunchError, TrainingError])
def test_every_error_ends_with_its_own_code(
    recipe: Path, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("it is wrong", where="here", fix="mend it")

    monkeypatch.setattr("align.runner.run.run_recipe", fail)
    done = align("run", recipe)
    assert done.exit_code == kind.exit_code
    assert done.stderr == "error: here: it is wrong\n  fix: mend it\n"


def test_a_bug_keeps_its_traceback(recipe: Path, tmp_path: Path) -> None:
    code = "import align.runner.run as r; r.run_recipe = lambda *a, **k: 1 / 0; from align.cli import main; main()"
    argv = [sys.executable, "-c", code, "run", str(recipe)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_ctrl_c_is_130(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("align.runner.run.run_recipe", interrupt)
    done = align("run", recipe)
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")


def test_set_overrides_and_is_checked(recipe: Path) -> None:
    assert align("check", recipe, "--set", "stages.sft.train.seed=3", "--set", "name=other").exit_code == 0
    done = align("check", recipe, "--set", "stages.sft.train.sed=3")
    assert done.exit_code == 2
    assert "--set stages.sft.train.sed=3" in done.stderr


def test_methods_lists_every_registered_one() -> None:
    told = (line for line in align("methods").output.splitlines() if line.strip())
    # Where a line begins with spaces, a summary goes on.
    lines = {line.split()[0]: line for line in told if not line.startswith("   ")}
    for kind, method in all_methods().items():
        assert method.batch.value in lines[kind]
        assert ("yes" if method.reference else "no") in lines[kind].split()


def test_schema_is_that_of_the_recipe(recipe: Path) -> None:
    schema = json.loads(align("schema").output)
    assert set(schema["required"]) == {"name", "stages"}
    kinds = schema["properties"]["stages"]["additionalProperties"]["discriminator"]["mapping"]
    assert {*all_methods(), "sample", "score", "select", "compare"} == set(kinds)


def test_status_and_results_before_a_run(recipe: Path) -> None:
    for name, words in (("status", "this recipe has not run here"), ("results", "no comparison has finished here")):
        done = align(name, recipe)
        assert done.exit_code == 1
        assert words in done.stderr


def test_gc_of_an_empty_store(recipe: Path) -> None:
    assert align("gc", "--dry-run").output == "0 bytes would be freed\n"
    assert align("gc").output == "0 bytes freed\n"


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_tables_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = align("methods").output.splitlines()
    assert max(map(len, lines)) <= columns
    assert any("dpo" in line for line in lines)


def test_no_colour_where_nobody_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in align("methods").output
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" in align("methods").output
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", align("methods").output)
