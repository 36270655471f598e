from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from align.report.graph import graph_plot, reference_nodes, stage_parents
from align.report.read import RunFiles, StageFiles, read_run


def files(recipe: dict[str, Any]) -> RunFiles:
    stages = {name: StageFiles(name, kind=str(s.get("kind")), settings=s) for name, s in recipe["stages"].items()}
    return RunFiles("x", recipe, "", stages)


FAN = {
    "model": {"base": "base"},
    "stages": {
        "base": {"kind": "pretrain", "data": "sft"},
        "sft": {"kind": "sft", "data": "sft"},
        **{f"m{i}": {"kind": "dpo", "policy": "sft", "reference": "sft", "data": "pairs"} for i in range(5)},
        "best": {"kind": "compare", "candidates": ["sft", *(f"m{i}" for i in range(5))], "baseline": "sft"},
    },
}


def boxes(svg: str) -> dict[str, tuple[float, float, float, float]]:
    found = {}
    for link in ET.fromstring(svg).iter("a"):
        rect, name = link.find("rect"), link.find("text")
        assert rect is not None
        assert name is not None
        found[str(name.text)] = tuple(float(rect.get(k, "nan")) for k in ("x", "y", "width", "height"))
    return found


def test_settings_name_the_parents_before_anything_ran() -> None:
    parents = stage_parents(files(FAN))
    assert parents["base"] == {}
    assert parents["sft"] == {"base": ["model.base"]}
    assert parents["m0"] == {"sft": ["policy", "reference"]}
    assert list(parents["best"]) == ["sft", "m0", "m1", "m2", "m3", "m4"]


def test_manifests_name_the_parents_afterwards(run: Any) -> None:
    parents = stage_parents(read_run(run.folder))
    assert {name: list(above) for name, above in parents.items()} == {
        "base": [],
        "sft": ["base"],
        "dpo": ["sft"],
        "comparison": ["base", "sft", "dpo"],
    }


@pytest.mark.parametrize("recipe", [FAN], ids=["fan"])
def test_parents_stand_left_and_no_box_covers_another(recipe: dict[str, Any]) -> None:
    run = files(recipe)
    placed = boxes(graph_plot(run))
    assert set(placed) == {*recipe["stages"], "sft@pairs"}
    edges = [(parent, name) for name, above in stage_parents(run).items() for parent in above]
    edges += [("sft", "sft@pairs"), *(("sft@pairs", f"m{i}") for i in range(5))]
    for parent, name in edges:
        assert placed[parent][0] + placed[parent][2] < placed[name][0]
    rows = list(placed.values())
    for i, (x, y, w, h) in enumerate(rows):
        for x2, y2, w2, h2 in rows[i + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_everything_is_within_the_drawing() -> None:
    svg = graph_plot(files(FAN))
    _, _, width, height = map(float, ET.fromstring(svg).get("viewBox", "").split())
    for x, y, w, h in boxes(svg).values():
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height


def test_a_circle_in_a_broken_recipe_does_not_hang() -> None:
    circle = {"stages": {"a": {"kind": "dpo", "policy": "b"}, "b": {"kind": "dpo", "policy": "a"}}}
    assert set(boxes(graph_plot(files(circle)))) == {"a", "b"}


def test_a_strange_name_stays_text(tmp_path: Path) -> None:
    name = '<i onclick="x">단계'
    assert set(boxes(graph_plot(files({"stages": {name: {"kind": "sft"}}})))) == {name}


def tips(svg: str) -> dict[str, tuple[str, str]]:
    """Box -> where it leads, and what it tells."""
    found = {}
    for link in ET.fromstring(svg).iter("a"):
        name, title = link.find("text"), link.find("title")
        assert name is not None
        assert title is not None
        found[str(name.text)] = (str(link.get("href")), str(title.text))
    return found


def test_reference_log_probs_are_a_box_of_their_own_that_tells_their_cost() -> None:
    run = files(FAN)
    for name, computed, reused in (("m0", 0, 12_000), ("m1", 12_000, 0), ("m2", 40, 11_960)):
        cost = {"reference/computed": computed, "reference/reused": reused, "reference/seconds": 31.0}
        run.stages[name].metrics.extend([{"step": 0, **cost}, {"step": 1, "loss": 0.6}])
    shown = tips(graph_plot(run))
    link, told = shown["sft@pairs"]
    assert link == f"#stage-{list(FAN['stages']).index('m1')}", "to the stage that computed most of them"
    assert told == (
        "sft@pairs (reference log-probs), done; m0: 12,000 reused rows in 31.0 s; m1: 12,000 computed rows in 31.0 s; "
        "m2: 40 computed, 11,960 reused rows in 31.0 s; m3: not yet; m4: not yet"
    )
    assert shown["m0"][1].endswith("policy, reference: sft"), "what it is made from is told as before"


def test_a_policy_straight_to_a_method_without_reference() -> None:
    stages = {**FAN["stages"], "free": {"kind": "simpo", "policy": "sft", "data": "pairs"}}
    stages["peer"] = {**FAN["stages"]["m0"], "engine": "trl"}
    run = files({"model": FAN["model"], "stages": stages})
    nodes = reference_nodes(run)
    assert {name: list(node.users) for name, node in nodes.items()} == {"sft@pairs": [f"m{i}" for i in range(5)]}
    assert nodes["sft@pairs"].state == "waiting"
    placed = boxes(graph_plot(run))
    assert placed["free"][0] < placed["m0"][0]
