"""Turns a node of the graph into the file that its worker reads."""

from __future__ import annotations

from pathlib import Path

from align.recipe import Graph, Node
from align.recipe.digest import Digests
from align.recipe.references import references
from align.recipe.sources import Sources
from align.spec.base import CodeRef
from align.spec.job import Job
from align.spec.stages import TrainedStage
from align.spec.train import LaunchSettings


def make_job(graph: Graph, node: Node, *, home: Path, work: Path) -> Job:
    """Everything the worker of a stage has to know. Secrets stay `${env:NAME}`.

    Args:
        graph: The graph the node is of.
        node: The stage.
        home: Root of the store.
        work: The stage's work folder.
    """
    loaded = graph.loaded
    return Job(
        recipe=loaded.recipe.name,
        stage=node.name,
        kind=type(node.stage).model_fields["kind"].default,
        settings=node.stage.model_dump(mode="json"),
        model=node.model,
        fingerprint=node.fingerprint,
        inputs={name: graph.nodes[name].fingerprint for name in node.parents},
        data=node.data,
        code=_code(graph, node, home),
        folder=str(loaded.folder.absolute()),
        work=str(work),
        home=str(home),
        launch=_launch(node),
        logging=loaded.recipe.logging,
    )


def _code(graph: Graph, node: Node, home: Path) -> dict[str, str]:
    """The user's functions that a stage runs, held at the bytes of now. A run that may not run them ends before."""
    names = [each.name for each in references(node.stage) if isinstance(each.mark, CodeRef)]
    sources, digests = Sources(graph.loaded), Digests(home)
    return {name: digests.file(sources.code(name)[0]) for name in names}


def _launch(node: Node) -> LaunchSettings:
    """What starts the stage; without training there is nothing that DeepSpeed would take apart."""
    if isinstance(node.stage, TrainedStage):
        return node.launch
    return LaunchSettings(processes=node.launch.processes if hasattr(node.stage, "launch") else 1)
