"""A recipe whose stages can be finished by hand, so that a run of it starts no worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from align.artifacts.manifest import Manifest
from align.artifacts.store import Artifact, Store
from align.recipe import Graph, build_graph, load_recipe

RECIPE = """
name: demo
model: {base: base, adapter: {kind: lora, rank: 4, alpha: 8}}
data:
  corpus: {generator: film-reviews, part: corpus, rows: 8, format: prompt_completion}
  rows: {path: rows.jsonl, format: prompt_completion}
  heldout: {generator: film-reviews, part: heldout, rows: 8, format: prompts}
stages:
  base: {kind: pretrain, data: corpus}
  sft: {kind: sft, data: rows}
  comparison: {kind: compare, candidates: [base, sft], baseline: base, prompts: heldout, scorers: [film-reviews]}
"""

INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 8}
RESULTS = {
    "candidates": {"base": {"gold": INTERVAL}, "sft": {"gold": INTERVAL}},
    "baseline": "base",
    "confidence": 0.95,
    "scorers": ["film-reviews"],
    "n": 8,
}

Finish = Callable[..., Artifact]


@pytest.fixture
def recipe(tmp_path: Path, align_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of three stages in a folder of its own; the current folder is another one."""
    source, here = tmp_path / "recipes", tmp_path / "here"
    source.mkdir()
    here.mkdir()
    (source / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    (source / "demo.yaml").write_text(RECIPE)
    monkeypatch.chdir(here)
    return source / "demo.yaml"


@pytest.fixture
def graph(recipe: Path, align_home: Path) -> Graph:
    return build_graph(load_recipe(recipe), align_home)


@pytest.fixture
def finish(graph: Graph, align_home: Path) -> Finish:
    """Put an artifact of a stage into the store, as its worker would."""

    def add(name: str, note: str = "") -> Artifact:
        node, store = graph.nodes[name], Store(align_home)
        folder = store.temporary(node.fingerprint)
        (folder / "note.txt").write_text(note)
        if name == "comparison":
            (folder / "results.json").write_text(json.dumps(RESULTS))
            (folder / "samples.jsonl").touch()
        inputs = {parent: graph.nodes[parent].fingerprint for parent in node.parents}
        kind = type(node.stage).model_fields["kind"].default
        return store.add(
            Manifest(kind=kind, stage=name, recipe="demo", fingerprint=node.fingerprint, inputs=inputs), folder
        )

    return add
