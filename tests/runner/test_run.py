from __future__ import annotations

import importlib.machinery
import json
from pathlib import Path

import pytest
from rich.console import Console

from align.artifacts.lock import locked
from align.artifacts.store import Store
from align.errors import DataError, LaunchError, RecipeError
from align.recipe import Graph
from align.runner.folder import RunFolder
from align.runner.run import run_recipe


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=100, quiet=False)


@pytest.fixture
def finished(finish) -> None:
    for name in ("base", "sft", "comparison"):
        finish(name)


def test_a_finished_recipe_is_reused(recipe: Path, finished: None, graph: Graph, console: Console) -> None:
    result = run_recipe(recipe, console=console)
    store = Store()
    assert {name: stage.state for name, stage in result.stages.items()} == dict.fromkeys(graph.nodes, "reused")
    assert result.folder == Path.cwd() / "runs" / "demo"
    for name, node in graph.nodes.items():
        assert (result.folder / name).is_symlink()
        assert (result.folder / name).resolve() == store.folder(node.fingerprint).resolve()
        assert result.stages[name].artifact == store.folder(node.fingerprint)
    assert set(result.results()) == {"comparison"}
    assert json.loads((result.folder / "results.json").read_text()) == result.results()["comparison"]
    assert "<html" in result.report.read_text()
    record = RunFolder(result.folder).read_record()
    assert record is not None
    assert [stage.state for stage in record.stages.values()] == ["reused"] * 3


def test_the_last_words_are_the_table_and_the_report(recipe: Path, finished: None, console: Console) -> None:
    run_recipe(recipe, console=console)
    lines = console.export_text().rstrip().splitlines()
    assert lines[-1] == "report: runs/demo/report.html"
    table = "\n".join(lines[3:-1])
    assert [line.split()[:2] for line in lines[:3]] == [["base", "reused"], ["sft", "reused"], ["comparison", "reused"]]
    assert "candidate" in table
    assert "0.50" in table


def test_it_runs_from_anywhere(recipe: Path, finished: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    result = run_recipe(Path("../recipes/demo.yaml"), console=Console(quiet=True))
    assert result.folder == other / "runs" / "demo"


def test_until_stops_after_a_stage(recipe: Path, finish, console: Console) -> None:
    finish("base")
    result = run_recipe(recipe, until="base", console=console)
    assert list(result.stages) == ["base"]
    assert console.export_text().rstrip().endswith("report: runs/demo/report.html")


def test_a_link_of_an_older_recipe_goes(recipe: Path, finished: None, console: Console) -> None:
    folder = run_recipe(recipe, console=console).folder
    run_recipe(recipe, overrides=["stages.sft.train.seed=1"], until="base", console=console)
    assert set(RunFolder(folder).links()) == {"base"}
    assert not (folder / "results.json").exists()


def test_from_forgets_a_stage_and_what_follows(recipe: Path, finished: None, graph: Graph) -> None:
    """What was forgotten is made again next; here somebody else's worker is in the way."""
    store = Store()
    work = store.work(graph.nodes["sft"].fingerprint)
    (work / "metrics.jsonl").touch()
    with (
        locked(work / "worker.lock", "stage sft"),
        pytest.raises(LaunchError, match="stage sft: a worker of this stage is still running"),
    ):
        run_recipe(recipe, from_="sft", console=Console(quiet=True))
    assert {name for name, node in graph.nodes.items() if store.find(node.fingerprint)} == {"base"}
    assert not (work / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"until": "sfft"}, "--until: the recipe has no stage `sfft`; did you mean `sft`?"),
        ({"from_": "reward"}, "--from: the recipe has no stage `reward`\n  fix: one of: base, sft, comparison"),
        ({"until": "base", "from_": "sft"}, "--from: stage `sft` does not run here"),
    ],
)
def test_stages_that_cannot_be_meant(recipe: Path, options: dict[str, str], words: str) -> None:
    with pytest.raises(RecipeError) as told:
        run_recipe(recipe, **options)
    assert words in str(told.value)
    assert not Path("runs").exists(), "nothing is written before the question is clear"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trackers are looked for in this folder and nowhere else."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setattr(
        "align.runner.run.find_spec", lambda name: importlib.machinery.PathFinder.find_spec(name, [str(folder)])
    )
    return folder


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_told_before_anything_runs(recipe: Path, packages: Path, name: str) -> None:
    recipe.write_text(recipe.read_text() + f"logging:\n  report_to:\n    - {name}\n")
    line = len(recipe.read_text().splitlines())
    (packages / "wandb").mkdir()  # where wandb keeps its files: no package
    with pytest.raises(LaunchError) as told:
        run_recipe(recipe, console=Console(quiet=True))
    assert told.value.exit_code == 4
    assert f"demo.yaml:{line}: logging.report_to.0: " in str(told.value)
    assert f"the package {name} is not installed\n  fix: pip install {name}, or" in str(told.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboard"), ("tensorboard", "tensorboardX")]
)
def test_a_tracker_that_is_installed_passes(
    recipe: Path, finished: None, packages: Path, name: str, package: str
) -> None:
    (packages / package).mkdir()
    (packages / package / "__init__.py").touch()
    run_recipe(recipe, overrides=[f"logging.report_to=[{name}]"], console=Console(quiet=True))


def test_trl_that_is_not_installed_is_told_before_anything_runs(recipe: Path, packages: Path) -> None:
    recipe.write_text(recipe.read_text().replace("{kind: sft,", "{kind: sft, engine: trl,"))
    with pytest.raises(LaunchError) as told:
        run_recipe(recipe, console=Console(quiet=True))
    assert told.value.exit_code == 4
    assert "stages.sft.engine: stage `sft` has engine trl, and the package trl is not installed" in str(told.value)
    assert "pip install 'align[trl]'" in str(told.value)
    assert not Path("runs").exists()


def test_a_failing_worker_ends_the_run_with_its_own_error(recipe: Path, finish, console: Console) -> None:
    """The real worker, on rows that are all bad."""
    (recipe.parent / "rows.jsonl").write_text('{"prompt": "a"}\n' * 8)
    swapped = ["stages.base.data=rows", "stages.sft.data=corpus"]
    with pytest.raises(DataError) as told:
        run_recipe(recipe, overrides=swapped, until="base", console=console)
    log = Path.cwd() / "runs" / "demo" / "logs" / "base.txt"
    assert told.value.where == "stage base"
    assert f"log: {log}" in told.value.message
    assert log.is_file()
    record = RunFolder(Path("runs/demo")).read_record()
    assert record is not None
    assert record.stages["base"].state == "failed"
    assert record.stages["base"].message == str(told.value)
    assert "failed" in Path("runs/demo/report.html").read_text()


def test_a_stage_that_another_run_works_on(recipe: Path, graph: Graph, align_home: Path) -> None:
    with (
        Store(align_home).lock(graph.nodes["base"].fingerprint, "base"),
        pytest.raises(LaunchError, match=r"\(pid \d+\) is working on stage base"),
    ):
        run_recipe(recipe, console=Console(quiet=True))


def test_a_second_run_of_the_recipe_here(recipe: Path) -> None:
    folder = Path("runs/demo")
    folder.mkdir(parents=True)
    with locked(folder / ".lock", "this recipe"), pytest.raises(LaunchError, match=r"\(pid \d+\) is working on"):
        run_recipe(recipe, console=Console(quiet=True))
