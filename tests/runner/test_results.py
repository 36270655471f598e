from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from align.errors import ArtifactError, RecipeError
from align.runner.folder import RunFolder, RunRecord, StageRecord
from align.runner.results import keep_results, one_comparison, run_results, show_results


def results(mean: float) -> dict:
    interval = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 64}
    return {
        "candidates": {"sft": {"gold": interval}, "dpo": {"gold": interval}},
        "baseline": "sft",
        "confidence": 0.95,
        "scorers": ["film-reviews"],
        "n": 64,
    }


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder.of("demo", tmp_path)
    made.path.mkdir(parents=True)
    return made


def finish(folder: RunFolder, tmp_path: Path, **comparisons: dict | None) -> None:
    record = RunRecord(recipe="demo", path="demo.yaml", pid=1, started=0.0)
    for name, content in comparisons.items():
        artifact = tmp_path / "store" / name
        artifact.mkdir(parents=True)
        if content is not None:
            (artifact / "results.json").write_text(json.dumps(content))
        folder.link(name, artifact)
        record.stages[name] = StageRecord(fingerprint=name, state="done")
    folder.write_record(record)


def test_comparisons_in_the_order_of_the_recipe(folder: RunFolder, tmp_path: Path) -> None:
    finish(folder, tmp_path, sft=None, second=results(0.2), first=results(0.1))
    assert run_results(folder) == {"second": results(0.2), "first": results(0.1)}
    keep_results(folder)
    assert json.loads(folder.results.read_text()) == results(0.1)


def test_one_comparison_needs_no_name(folder: RunFolder, tmp_path: Path) -> None:
    finish(folder, tmp_path, comparison=results(0.1))
    assert one_comparison(folder) == one_comparison(folder, "comparison") == results(0.1)


def test_several_comparisons_have_to_be_named(folder: RunFolder, tmp_path: Path) -> None:
    finish(folder, tmp_path, one=results(0.1), two=results(0.2))
    assert one_comparison(folder, "two") == results(0.2)
    with pytest.raises(RecipeError, match=r"--stage: the run has several comparisons\n  fix: one of: one, two"):
        one_comparison(folder)


@pytest.mark.parametrize("stage", ["tow", "sft"])
def test_an_unknown_comparison(folder: RunFolder, tmp_path: Path, stage: str) -> None:
    finish(folder, tmp_path, sft=None, two=results(0.2))
    with pytest.raises(RecipeError, match=f"no finished comparison is called '{stage}'"):
        one_comparison(folder, stage)


def test_no_comparison_yet(folder: RunFolder, tmp_path: Path) -> None:
    folder.results.write_text("{}")
    finish(folder, tmp_path, sft=None)
    with pytest.raises(ArtifactError, match="no comparison has finished here"):
        one_comparison(folder)
    keep_results(folder)
    assert not folder.results.exists(), "results of an earlier run are not this one's"


def test_every_comparison_is_shown(folder: RunFolder, tmp_path: Path) -> None:
    finish(folder, tmp_path, one=results(0.1), two=results(0.2))
    console = Console(width=100)
    with console.capture() as text:
        show_results(folder, console)
    assert text.get().count("baseline") >= 2
    assert "0.20" in text.get()
