"""The graph of stages as a drawing: columns by depth, with room for edges that pass a column by.

The layout is Sugiyama's in small: an edge over several columns gets a stand-in in each column between, so that it runs
around the stages there, and every column is ordered by the mean position of its neighbours.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from align.report.numbers import count, duration
from align.report.read import RunFiles, StageFiles
from align.report.records import makes_records
from align.report.svg import add, canvas, markup, tip

BOX_HEIGHT, BOX_WIDTH = 46, 84
COLUMN_GAP, ROW_GAP, MARGIN = 56, 18, 2
CHARACTER = 7.6
SWEEPS = 4
DATA_KEYS = ("data", "prompts", "samples", "include", "ptx")
"""Settings that hold the name of an entry of `data`, or of a stage that makes records."""
COST = ("reference/computed", "reference/reused", "reference/seconds")
"""Metrics, logged once, of what a stage's reference took."""


@dataclass
class Spot:
    """A stage (`name`) or the stand-in of a passing edge (no name) in its column."""

    name: str | None
    column: int
    before: list[Spot] = field(default_factory=list)
    after: list[Spot] = field(default_factory=list)
    y: float = 0.0
    """Middle, in pixels."""

    @property
    def height(self) -> float:
        return BOX_HEIGHT if self.name else 4.0


def stage_parents(run: RunFiles) -> dict[str, dict[str, list[str]]]:
    """Stage -> the stages it is made from -> the settings that name each.

    A finished stage's manifest knows them all; before that, every setting that holds the name of a stage counts, unless
    it reads records and the stage makes none. The base of the recipe's model is left out where another parent stands on
    it already.
    """
    model = run.recipe.get("model")
    base = str(model.get("base")) if isinstance(model, dict) else ""
    parents: dict[str, dict[str, list[str]]] = {}
    for name, stage in run.stages.items():
        found: dict[str, list[str]] = {}
        for key, value in _strings(stage.settings):
            if value in run.stages and value != name and key != "kind" and _may_name(stage, key, run.stages[value]):
                found.setdefault(value, []).append(key)
        for value in stage.manifest.inputs if stage.manifest else (base,):
            if value in run.stages and value != name and not (value == base and found):
                found.setdefault(value, ["model.base"] if value == base else [])
        parents[name] = found
    return parents


def _may_name(stage: StageFiles, key: str, other: StageFiles) -> bool:
    """Whether a setting can mean a stage that has the name it holds."""
    return makes_records(other.kind) or not (key in DATA_KEYS or (makes_records(stage.kind) and key == "candidates"))


@dataclass(frozen=True)
class ReferenceFiles:
    """Reference log-probabilities that some stages share, as far as their metrics tell.

    Attributes:
        policy: The stage whose policy is the reference.
        data: What they are of: an entry of `data`, or the stage that makes the records.
        users: Stage -> metrics of what they cost it; empty before it has them.
    """

    policy: str
    data: str
    users: dict[str, dict[str, float]]

    @property
    def state(self) -> str:
        return "done" if any(self.users.values()) else "waiting"

    @property
    def story(self) -> str:
        """What it cost whom."""
        return "; ".join(f"{name}: {_cost(cost)}" for name, cost in self.users.items())


def reference_nodes(run: RunFiles) -> dict[str, ReferenceFiles]:
    """`policy@data` -> the log-probabilities of that policy on that data."""
    found: dict[str, ReferenceFiles] = {}
    for name, stage in run.stages.items():
        if stage.settings.get("engine", "align") != "align":
            continue  # a peer takes its own
        policy, data = stage.settings.get("reference"), stage.settings.get("data")
        if isinstance(policy, str) and isinstance(data, str) and policy in run.stages and policy != name:
            node = found.setdefault(f"{policy}@{data}", ReferenceFiles(policy, data, {}))
            node.users[name] = {key: value for line in stage.metrics[:1] for key, value in line.items() if key in COST}
    return {name: node for name, node in found.items() if name not in run.stages}


def _with_references(
    parents: dict[str, dict[str, list[str]]], nodes: Mapping[str, ReferenceFiles], made: Collection[str]
) -> dict[str, dict[str, list[str]]]:
    """The parents with reference nodes between a policy and the stages that read them; these lose their direct edge.

    Args:
        parents: Of the stages.
        nodes: The reference nodes.
        made: The stages that make records, of which a node may be.
    """
    joined = dict(parents)
    for name, node in nodes.items():
        joined[name] = {each: [] for each in (node.policy, node.data) if each == node.policy or each in made}
    for name, node in nodes.items():
        for user in node.users:
            above = {parent: keys for parent, keys in parents[user].items() if parent != node.policy}
            joined[user] = {name: ["reference"], **above}
    return joined


def _cost(cost: Mapping[str, float]) -> str:
    if not cost:
        return "not yet"
    rows = {word: cost.get(f"reference/{word}", 0.0) for word in ("computed", "reused")}
    told = [f"{count(number)} {word}" for word, number in rows.items() if number]
    return f"{', '.join(told) or 'no'} rows in {duration(cost.get('reference/seconds', 0.0))}"


def graph_plot(run: RunFiles) -> str:
    """The stages as boxes with links to their sections, the graph running from left to right."""
    nodes = reference_nodes(run)
    shown = {name: StageFiles(name, "reference log-probs", node.state) for name, node in nodes.items()}
    made_from = stage_parents(run)
    made = [name for name, stage in run.stages.items() if makes_records(stage.kind)]
    parents = _with_references(made_from, nodes, made)
    run = replace(run, stages=run.stages | shown)
    columns = _columns(parents)
    _order(columns)
    width_of = [max((_box_width(s, run) for s in column), default=0.0) for column in columns]
    starts = [MARGIN + sum(width_of[:i]) + COLUMN_GAP * i for i in range(len(columns))]
    height = _place(columns)
    root = canvas(starts[-1] + width_of[-1] + MARGIN, height, "Graph of stages")
    for i, column in enumerate(columns):
        for spot in column:
            x = starts[i] + (width_of[i] if spot.name is None else _box_width(spot, run))
            if spot.name is None:
                add(root, "line", "edge", x1=starts[i], x2=x, y1=spot.y, y2=spot.y)
            for after in spot.after:
                _edge(root, x, spot.y, starts[i + 1], after.y, arrow=after.name is not None)
    for i, column in enumerate(columns):
        for spot in column:
            if spot.name is not None:
                _box(root, run, spot.name, made_from.get(spot.name, {}), starts[i], spot.y, nodes.get(spot.name))
    return markup(root)


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string of nested settings with the key it stands at."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _strings(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


def _columns(parents: Mapping[str, Mapping[str, list[str]]]) -> list[list[Spot]]:
    depth: dict[str, int] = {}

    def deep(name: str, above: tuple[str, ...] = ()) -> int:
        if name not in depth:
            # A circle cannot come out of a recipe that ran; a broken file must not hang the page.
            depth[name] = max((deep(p, (*above, name)) + 1 for p in parents[name] if p not in above), default=0)
        return depth[name]

    columns: list[list[Spot]] = [[] for _ in range(1 + max(map(deep, parents), default=0))]
    spots = {name: Spot(name, depth[name]) for name in parents}
    for spot in spots.values():
        columns[spot.column].append(spot)
    for name, above in parents.items():
        for parent in above:
            _join(columns, spots[parent], spots[name])
    return columns


def _join(columns: list[list[Spot]], start: Spot, end: Spot) -> None:
    previous = start
    for column in range(start.column + 1, end.column):
        between = Spot(None, column)
        columns[column].append(between)
        previous.after.append(between)
        between.before.append(previous)
        previous = between
    if end.column > start.column:
        previous.after.append(end)
        end.before.append(previous)


def _order(columns: list[list[Spot]]) -> None:
    """Order every column by its neighbours' mean rank, forth and back a few times."""
    for sweep in range(SWEEPS):
        forth = sweep % 2 == 0
        for column in columns if forth else reversed(columns):
            rank = {id(spot): i for other in columns for i, spot in enumerate(other)}
            middle = {}
            for spot in column:
                near = spot.before if forth else spot.after
                middle[id(spot)] = sum(rank[id(n)] for n in near) / len(near) if near else rank[id(spot)]
            # Of equals, a passing edge goes above the stages.
            column.sort(key=lambda spot: (middle[id(spot)], spot.name is not None))


def _place(columns: list[list[Spot]]) -> float:
    """Stack every column, centred; the height of the whole."""
    tall = [sum(s.height for s in column) + ROW_GAP * (len(column) - 1) for column in columns]
    height = max(tall)
    for column, own in zip(columns, tall, strict=True):
        y = MARGIN + (height - own) / 2
        for spot in column:
            spot.y = y + spot.height / 2
            y += spot.height + ROW_GAP
    return height + 2 * MARGIN


def _box_width(spot: Spot, run: RunFiles) -> float:
    if spot.name is None:
        return 0.0
    longest = max(len(spot.name), len(run.stages[spot.name].kind) + 4)
    return max(BOX_WIDTH, 24 + CHARACTER * longest)


def _edge(root: ET.Element, x1: float, y1: float, x2: float, y2: float, *, arrow: bool) -> None:
    end = x2 - 5 if arrow else x2
    middle = (x1 + end) / 2
    add(root, "path", "edge", d=f"M{x1:.1f},{y1:.1f} C{middle:.1f},{y1:.1f} {middle:.1f},{y2:.1f} {end:.1f},{y2:.1f}")
    if arrow:
        add(
            root,
            "polygon",
            "arrow",
            points=f"{x2:.1f},{y2:.1f} {x2 - 7:.1f},{y2 - 3.5:.1f} {x2 - 7:.1f},{y2 + 3.5:.1f}",
        )


def _box(
    root: ET.Element,
    run: RunFiles,
    name: str,
    parents: Mapping[str, list[str]],
    x: float,
    y: float,
    node: ReferenceFiles | None,
) -> None:
    stage, width = run.stages[name], _box_width(Spot(name, 0), run)
    # What has no section of its own leads to the stage that computed it.
    section = name if node is None else max(node.users, key=lambda user: node.users[user].get(COST[0], 0.0))
    link = add(root, "a", href=f"#stage-{list(run.stages).index(section)}")
    made = "; ".join(f"{', '.join(keys) or 'made from'}: {parent}" for parent, keys in parents.items())
    made = made if node is None else node.story
    tip(link, f"{name} ({stage.kind or 'unknown kind'}), {stage.state}" + (f"; {made}" if made else ""))
    add(link, "rect", f"box {stage.state}", x=x, y=y - BOX_HEIGHT / 2, width=width, height=BOX_HEIGHT, rx=7)
    add(link, "text", "name", name, x=x + 12, y=y - 3)
    add(link, "text", "tick", stage.kind, x=x + 12, y=y + 13)
