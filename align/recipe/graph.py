"""The graph of a recipe: every stage with what it is made from, in an order that respects it, under its fingerprint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush
from pathlib import Path

from align.errors import RecipeError
from align.recipe.check import check_names
from align.recipe.digest import Digests
from align.recipe.fingerprint import Fingerprints
from align.recipe.ignored import check_ignored
from align.recipe.lineage import Lineage, declared_model, trains_base
from align.recipe.load import LoadedRecipe
from align.recipe.machine import fitted
from align.recipe.made import records_made
from align.recipe.pins import Pins
from align.recipe.references import Mark, Reference, references
from align.recipe.sources import Sources
from align.recipe.validate import combine
from align.spec.base import DataRef, StageRef
from align.spec.data import DataSource
from align.spec.model import ModelSettings
from align.spec.records import RecordsStage
from align.spec.stages import PolicyStage, Stage
from align.spec.train import LaunchSettings


@dataclass(frozen=True)
class Node:
    """One stage, resolved. Whatever it takes from the Hub is named at its commit, where that is known.

    Attributes:
        name: Its name in the recipe.
        stage: Its settings, with a pack budget for this machine where the recipe says none.
        parents: The stages it names, those whose records it reads and its base included, in the order of its fields.
        model: The recipe's model with the stage's overrides; `base` is the parent where that was trained in full. None
            for a kind that starts from no model.
        data: The entries of `data` it names, and what stages it names make, each a file of the store.
        fingerprint: SHA-256 of everything that makes its result.
        launch: The stage's own launch settings, or the recipe's.
    """

    name: str
    stage: Stage
    parents: tuple[str, ...]
    model: ModelSettings | None
    data: dict[str, DataSource]
    fingerprint: str
    launch: LaunchSettings


@dataclass(frozen=True)
class Graph:
    """The stages of a recipe.

    Attributes:
        loaded: The recipe.
        nodes: Every stage by name, parents first, otherwise in the recipe's order.
        unresolved: Hub names whose commit could not be found out, with the reason.
    """

    loaded: LoadedRecipe
    nodes: dict[str, Node]
    unresolved: dict[str, str]

    def upto(self, until: str | None) -> Graph:
        """The graph of one stage and all it needs; the whole graph for None."""
        if until is None:
            return self
        kept, todo = set(), [until]
        while todo:
            if (name := todo.pop()) not in kept:
                kept.add(name)
                todo += self.nodes[name].parents
        return Graph(self.loaded, {name: node for name, node in self.nodes.items() if name in kept}, self.unresolved)

    def descendants(self, name: str) -> set[str]:
        """The stages that are made from this one, directly or not."""
        found: set[str] = set()
        for each, node in self.nodes.items():
            if found & set(node.parents) or name in node.parents:
                found.add(each)
        return found


def build_graph(loaded: LoadedRecipe, home: Path) -> Graph:
    """Check what spans several parts of a recipe, and resolve its stages.

    Args:
        loaded: The recipe.
        home: Root of the store, where digests of files are remembered and records of stages lie.

    Raises:
        RecipeError: Unknown names, cycles, wrong ports, lineages that cannot be, settings that nothing reads, missing
            files; all of them at once.
        DataError: A data file cannot be read.
    """
    stages = loaded.stages
    sources = Sources(loaded)
    _raise(sources.variables())
    edges = {name: _named(loaded, name) for name in stages}
    order, cycle = _sorted(edges)
    errors = [*check_names(loaded), *sources.check(), *check_ignored(loaded)]
    _raise([*errors, _cycle_error(loaded, cycle)] if cycle else errors)
    lineage = Lineage(loaded)
    models = {name: lineage.resolve(name) for name in order}
    _raise(lineage.errors)
    digests = Digests(home)
    fingerprints, pins = Fingerprints(loaded, sources, digests), Pins(loaded, digests)
    nodes: dict[str, Node] = {}
    made: dict[str, DataSource] = {}
    for name in order:
        stage, model = stages[name], models[name]
        base = (model.base,) if model is not None and model.base in stages else ()
        marked = list(references(stage))
        data = [each.name for each in marked if isinstance(each.mark, DataRef)]
        named = [each.name for each in marked if isinstance(each.mark, StageRef) or _is_made(each, made)]
        fingerprint = fingerprints.add(name, stage, model)  # first: it tells what the Hub does not have
        nodes[name] = Node(
            name=name,
            stage=fitted(pins.stage(stage)),
            parents=tuple(dict.fromkeys([*named, *base])),
            fingerprint=fingerprint,
            model=None if model is None else pins.model(model),
            data={each: made.get(each) or pins.source(loaded.recipe.data[each]) for each in data},
            launch=getattr(stage, "launch", None) or loaded.recipe.launch,
        )
        if isinstance(stage, RecordsStage):
            made[name] = records_made(stage, fingerprint, home)
    digests.save()
    return Graph(loaded, nodes, digests.unresolved)


def _raise(errors: Iterable[RecipeError]) -> None:
    if errors := list(errors):
        raise combine(errors)


def _named(loaded: LoadedRecipe, name: str) -> list[str]:
    """The other stages that a stage names and could go on from, its declared base included."""
    stages, stage = loaded.stages, loaded.stages[name]
    marked = [each for each in references(stage) if each.name in stages]
    named = [each.name for each in marked if _port(each.mark) == StageRef(stages[each.name].produces)]
    if isinstance(stage, PolicyStage) and (model := declared_model(loaded, name, stage)) is not None:
        named += [model.base] if model.base in stages and trains_base(loaded, model.base) else []
    return [each for each in dict.fromkeys(named) if each != name]


def _port(mark: Mark) -> Mark:
    """What a stage has to produce to be named there."""
    return StageRef("records") if isinstance(mark, DataRef) else mark


def _is_made(reference: Reference, made: Mapping[str, DataSource]) -> bool:
    """Whether it names records that a stage makes."""
    return isinstance(reference.mark, DataRef) and reference.name in made


def _sorted(edges: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Names with their parents first, otherwise in the given order; and a cycle, its first name repeated, if any."""
    place = {name: i for i, name in enumerate(edges)}
    sorter = TopologicalSorter(edges)
    order: list[str] = []
    ready: list[tuple[int, str]] = []
    try:
        sorter.prepare()
    except CycleError as error:
        return [], list(reversed(error.args[1]))
    while sorter.is_active():
        for name in sorter.get_ready():
            heappush(ready, (place[name], name))
        _, name = heappop(ready)
        order.append(name)
        sorter.done(name)
    return order, []


def _cycle_error(loaded: LoadedRecipe, cycle: list[str]) -> RecipeError:
    return RecipeError(
        f"stages wait for each other: {' -> '.join(cycle)}",
        where=loaded.where("stages", cycle[0]),
        fix="let one of them name an earlier stage",
    )
