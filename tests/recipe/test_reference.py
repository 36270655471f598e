"""Reference log-probabilities as nodes: which there are, who shares them, whether they are there."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from align.recipe import Graph
from align.recipe.digest import Digests
from align.recipe.plan import Plan, make_plan
from align.recipe.plan_table import plan_table
from align.recipe.reference import ReferenceNode, rows_id
from tests.recipe.conftest import Check

FAN = """
name: fan
model: {base: base, adapter: {kind: lora, rank: 4, alpha: 8}}
data:
  corpus: {generator: film-reviews, part: corpus, rows: 100, format: prompt_completion}
  preferences: {generator: film-reviews, part: preferences, rows: 100, format: pairs}
  own: {path: pairs.jsonl, format: pairs}
stages:
  base: {kind: pretrain, data: corpus, train: {max_tokens: 512}}
  sft: {kind: sft, data: corpus}
  dpo: {kind: dpo, policy: sft, reference: sft, data: preferences}
  ipo: {kind: ipo, policy: sft, reference: sft, data: preferences}
  far: {kind: dpo, policy: sft, reference: base, data: preferences}
  mine: {kind: dpo, policy: sft, reference: sft, data: own}
"""


@pytest.fixture
def graph(check: Check) -> Graph:
    return check(FAN, pairs='{"prompt": "p", "chosen": "c", "rejected": "r"}\n' * 7)


def planned(
    graph: Graph, *finished: str, kept: Mapping[str, Mapping[str, int]] | None = None
) -> tuple[Plan, dict[str, ReferenceNode]]:
    done = {graph.nodes[name].fingerprint for name in finished}
    named = {graph.nodes[name].fingerprint: rows for name, rows in (kept or {}).items()}
    plan = make_plan(graph, done.__contains__, kept_references=lambda each: named.get(each, {}), compute_bytes=4)
    return plan, {node.name: node for node in plan.references}


def id_of(graph: Graph, stage: str) -> str:
    node = graph.nodes[stage]
    ((_, source),) = node.data.items()
    return rows_id(node.stage, source, graph.loaded.folder, Digests(graph.loaded.folder))


def test_one_node_for_each_policy_and_data(graph: Graph) -> None:
    _, nodes = planned(graph)
    assert {name: node.users for name, node in nodes.items()} == {
        "sft@preferences": ("dpo", "ipo"),
        "base@preferences": ("far",),
        "sft@own": ("mine",),
    }
    assert {node.state for node in nodes.values()} == {"run"}
    assert [(node.rows, node.at_most) for node in nodes.values()] == [(200, True), (200, True), (14, True)]
    assert nodes["sft@preferences"].note == "reference log-probs of sft on preferences, used by dpo, ipo"


def test_it_stands_in_the_table_before_the_first_that_needs_it(graph: Graph) -> None:
    out = io.StringIO()
    plan, _ = planned(graph)
    Console(file=out, width=200).print(plan_table(plan))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    names = [words[0] for words in lines]
    assert names[2:10] == ["base", "sft", "sft@preferences", "dpo", "ipo", "base@preferences", "far", "sft@own"]
    assert lines[4][:6] == ["sft@preferences", "reference", "run", "≤", "200", "rows"]
    assert " ".join(lines[4][6:]) == "reference log-probs of sft on preferences, used by dpo, ipo"


def test_rows_that_are_there_are_reused_whoever_took_them(graph: Graph) -> None:
    """What dpo took serves ipo, and dpo with other settings of its own."""
    kept = {"sft": {id_of(graph, "dpo"): 187}}
    _, nodes = planned(graph, "base", "sft", "dpo", kept=kept)
    node = nodes["sft@preferences"]
    assert (node.state, node.rows, node.at_most) == ("reuse", 187, False)
    assert nodes["base@preferences"].state == "run", "the same data under another policy"
    assert nodes["sft@own"].state == "run", "the same policy on other data"


def test_what_nobody_needs_any_more_is_not_run(graph: Graph) -> None:
    _, nodes = planned(graph, "base", "sft", "dpo", "ipo")
    assert nodes["sft@preferences"].state == "reuse"
    _, nodes = planned(graph, "base", "sft", "dpo")
    assert nodes["sft@preferences"].state == "run"


def test_stages_that_ask_for_other_tokens_are_looked_at_one_by_one(check: Check) -> None:
    graph = check(FAN, "stages.ipo.train={max_tokens: 99}")
    kept = {"sft": {id_of(graph, "dpo"): 187}}
    assert planned(graph, kept=kept)[1]["sft@preferences"].state == "run"
    kept["sft"][id_of(graph, "ipo")] = 150
    assert planned(graph, kept=kept)[1]["sft@preferences"].state == "reuse"


@pytest.mark.parametrize(
    "override",
    [
        "data.preferences.rows=101",
        "data.preferences.seed=1",
        "data.preferences.limit=50",
        "data.preferences.system=Be brief",
        "stages.dpo.train={max_tokens: 99}",
    ],
)
def test_what_changes_the_rows_changes_their_id(override: str, check: Check) -> None:
    assert id_of(check(FAN, override), "dpo") != id_of(check(FAN), "dpo")


@pytest.mark.parametrize(
    "override",
    [
        "stages.dpo.beta=0.3",
        "stages.dpo.train={seed: 4, epochs: 2, global_batch_size: 3, pack_tokens: 9}",
        "name=other",
    ],
)
def test_what_does_not_keeps_it(override: str, check: Check) -> None:
    assert id_of(check(FAN, override), "dpo") == id_of(check(FAN), "dpo")


def test_a_file_counts_by_its_content(check: Check, tmp_path: Path) -> None:
    graph = check(FAN)
    before = id_of(graph, "mine")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "s"}\n')
    assert id_of(graph, "mine") != before
    (tmp_path / "moved.jsonl").write_text("{}\n")
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    assert id_of(check(FAN, "data.own.path=moved.jsonl"), "mine") == before


def test_without_a_reference_there_is_no_node(check: Check) -> None:
    text = FAN.split("  dpo: {")[0].replace("  preferences:", "  #").replace("  own:", "  #")
    assert planned(check(text))[0].references == ()
