"""What the worker is told is what the fingerprint was made of, also when a branch of the Hub moves in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from align.recipe import Graph, build_graph, load_recipe
from align.recipe.schema import stage_kinds
from align.runner.job import make_job
from align.spec.job import Job

COMMIT, LATER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"

RECIPE = """\
name: hub
model: {base: someone/model}
data:
  rows: {hub: someone/rows, format: alpaca}
  pairs: {hub: someone/rows, split: test, revision: v1, format: pairs}
  mine: {path: mine.jsonl, format: alpaca}
stages:
  sft: {kind: sft, data: rows}
  dpo: {kind: dpo, policy: sft, reference: sft, data: pairs}
  full: {kind: sft, data: mine, model: {base: local, adapter: none}}
  child: {kind: sft, policy: full, data: mine, model: {base: full}}
  more: {kind: sft, policy: {adapter: someone/adapter}, data: mine}
  last: {kind: compare, candidates: [sft, dpo], baseline: sft, prompts: rows}
"""

Point = Callable[[str], None]


@pytest.fixture
def point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Point:
    """Let every branch in the local cache of the Hub be at a commit; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def move(commit: str) -> None:
        for repo in ("models--someone--model", "models--someone--adapter", "datasets--someone--rows"):
            refs = tmp_path / "hub" / repo / "refs"
            refs.mkdir(parents=True, exist_ok=True)
            for branch in ("main", "v1"):
                (refs / branch).write_text(commit)

    return move


@pytest.fixture
def graph(tmp_path: Path) -> Callable[[], Graph]:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "config.json").write_text("{}")
    (tmp_path / "mine.jsonl").write_text("{}\n")
    (tmp_path / "hub.yaml").write_text(RECIPE)
    return lambda: build_graph(load_recipe(tmp_path / "hub.yaml"), tmp_path / "home")


def jobs(graph: Graph, folder: Path) -> dict[str, Job]:
    """The jobs as their workers read them."""
    made = {name: make_job(graph, node, home=folder, work=folder / name) for name, node in graph.nodes.items()}
    return {name: Job.model_validate(json.loads(job.model_dump_json())) for name, job in made.items()}


def test_a_job_names_the_commits_that_were_hashed(graph: Callable[[], Graph], point: Point, tmp_path: Path) -> None:
    point(COMMIT)
    planned = graph()
    assert planned.unresolved == {}
    point(LATER)
    told = jobs(planned, tmp_path)
    for name in ("sft", "dpo", "more"):
        assert told[name].model is not None
        assert told[name].model.revision == COMMIT, name
    for name, entry in (("sft", "rows"), ("dpo", "pairs"), ("last", "rows")):
        assert told[name].data[entry].revision == COMMIT, name
    stage = stage_kinds()["sft"].model_validate(told["more"].settings)
    assert (stage.policy.adapter, stage.policy.revision) == ("someone/adapter", COMMIT)
    # What is planned now is another thing throughout.
    again = graph()
    assert jobs(again, tmp_path)["sft"].model.revision == LATER
    moved = {name for name in again.nodes if again.nodes[name].fingerprint != planned.nodes[name].fingerprint}
    assert moved == {"sft", "dpo", "more", "last"}


def test_what_is_not_on_the_hub_has_no_revision(graph: Callable[[], Graph], point: Point, tmp_path: Path) -> None:
    point(COMMIT)
    told = jobs(graph(), tmp_path)
    assert [(told[name].model.base, told[name].model.revision) for name in ("full", "child")] == [
        ("local", None),
        ("full", None),
    ]
    assert told["dpo"].settings["policy"] == "sft"


def test_without_an_answer_the_branch_stays(graph: Callable[[], Graph], tmp_path: Path, point: Point) -> None:
    planned = graph()
    assert set(planned.unresolved) == {
        "someone/model@main",
        "someone/adapter@main",
        "someone/rows@main",
        "someone/rows@v1",
    }
    told = jobs(planned, tmp_path)
    assert told["sft"].model.revision == "main"
    assert told["dpo"].data["pairs"].revision == "v1"
