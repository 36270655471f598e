"""Stages that make records on the page: their numbers, what became of candidates, the first records, the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.artifacts.manifest import Manifest
from align.artifacts.store import Store
from align.report.graph import graph_plot, stage_parents
from align.report.page import write_report
from align.report.read import read_run
from align.report.records import record_values, selection_rows, shown_records
from tests.report.conftest import HOSTILE, KOREAN, FakeRun

RECIPE = """\
name: quickstart
data:
  pairs: {path: pairs.jsonl, format: pairs}
  sft: {path: sft.jsonl, format: alpaca}
stages:
  sft: {kind: sft, data: sft}
  drawn: {kind: sample, policies: [sft], prompts: pairs}
  scored: {kind: score, samples: drawn, scorers: [film-reviews]}
  chosen: {kind: select, candidates: scored, how: best_worst}
  dpo: {kind: dpo, policy: sft, reference: sft, data: chosen}
"""
ASKED = [{"role": "user", "content": f"Why? {KOREAN}"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "drawn": [
        {"prompt": ASKED, "responses": ["a\u2028b", HOSTILE], "sources": ["sft", "sft"], "tokens": [3, 9],
         "ended": [True, False]},
        *({"prompt": f"more {i}", "responses": ["x"]} for i in range(9)),
    ],
    "scored": [{"prompt": ASKED, "responses": ["a", "b"], "sources": ["sft", "data.chosen"], "scores": [0.25, None]}],
    "chosen": [{"prompt": ASKED, "chosen": "a", "rejected": "b", "chosen_score": 1.0, "rejected_score": 0.5,
                "chosen_source": "sft", "rejected_source": "data.chosen"}],
}  # fmt: skip
METRICS = {"drawn": {"prompts": 10, "completions": 20, "ended": 0.25, "sft/logp": -12.5}, "scored": {"mean": 0.25}}
SELECTION = {"kept": 2, "left": {"in no pair": 18}, "prompts": {"all candidates tied": 3}, "pairs": {}}


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    fake = FakeRun(tmp_path / "runs" / "quickstart", Store(tmp_path / "home"))
    fake.folder.mkdir(parents=True)
    (fake.folder / "recipe.yaml").write_text(RECIPE)
    kinds = {name: stage["kind"] for name, stage in yaml.safe_load(RECIPE)["stages"].items()}
    for name, rows in ROWS.items():
        manifest = Manifest(
            kind=kinds[name], stage=name, recipe="x", fingerprint=name[0] * 64, metrics=METRICS.get(name, {})
        )
        files: dict[str, Any] = {"records.jsonl": rows}
        fake.add(manifest, files | ({"selection.json": SELECTION} if name == "chosen" else {}))
    return fake


def page(run: FakeRun) -> str:
    return write_report(run.folder, run.folder / "report.html").read_text(encoding="utf-8")


def test_the_page_has_a_section_of_records(run: FakeRun) -> None:
    shown = page(run)
    records = shown[shown.index('<section id="records">') : shown.index('<section id="training">')]
    for words in ("score 0.25", "9 tokens, cut off", "data.chosen", "rejected (data.chosen)", "candidates: in no pair",
                  "prompts: all candidates tied", "Completions", KOREAN, "−12.5"):  # fmt: skip
        assert words in records
    training = shown[shown.index('<section id="training">') :]
    assert "stage-1" not in training.split('<section id="recipe">')[0], "they train nothing"
    assert "<script" not in shown
    assert "more 1" in records
    assert "more 2" not in records, "the first three rows"


def test_half_a_run_and_damaged_files_are_shown_as_far_as_they_go(run: FakeRun) -> None:
    (run.artifact("scored") / "records.jsonl").write_text(
        '{"prompt": 3, "responses": "x"}\nnot json\n{"messages": []}\n'
    )
    (run.artifact("chosen") / "selection.json").write_text("[]")
    (run.folder / "drawn").unlink()
    run.status(drawn={"state": "failed", "fingerprint": "d", "message": "no room"})
    shown = page(run)
    assert "no room" in shown
    assert "candidates kept" not in shown


def test_the_graph_goes_through_records(run: FakeRun) -> None:
    read = read_run(run.folder)
    parents = stage_parents(read)
    assert {name: sorted(above) for name, above in parents.items()} == {
        "sft": [],
        "drawn": ["sft"],
        "scored": ["drawn"],
        "chosen": ["scored"],
        "dpo": ["chosen", "sft"],
    }
    assert "sft@chosen" in graph_plot(read)


def test_numbers_and_rows() -> None:
    assert record_values({"prompts": 1200.0, "sft/completions": 4800.0, "candidates_kept": 3.0, "ended": 0.5}) == [
        ("Prompts", "1,200"), ("Sft · completions", "4,800"), ("Candidates kept", "3"), ("Ended", "0.5"),
    ]  # fmt: skip
    assert selection_rows({}) == []
    kept = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "source": "sft",
        "score": 1,
    }
    (shown,) = shown_records([kept])
    assert shown == {"prompt": "q", "answers": [{"candidate": "sft", "text": "a", "figures": ["score 1.00"]}]}
    many = {"prompt": "q", "responses": [str(i) for i in range(99)]}
    assert len(shown_records([many])[0]["answers"]) == 8
    assert json.dumps(shown_records([{"rejected": "x"}])) == "[]"
