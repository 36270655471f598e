"""Reference log-probabilities as nodes of the graph: one for each policy and data that some stages take them of.

They are no stages: the first stage that needs them computes them, and whoever comes later finds them in the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.methods import get_method
from align.recipe.digest import Digests, digest_of
from align.recipe.env import resolve_env
from align.recipe.made import makers
from align.recipe.rows import count_rows
from align.recipe.sources import plugin_version
from align.spec.data import DataSource, FileData, GeneratedData
from align.spec.online import RolloutStage
from align.spec.stages import TrainedStage, engine_of, reference_of
from align.types import Batch

if TYPE_CHECKING:
    from align.recipe.graph import Graph, Node

COMPLETIONS = {Batch.TOKENS: 1, Batch.PAIRED: 2, Batch.UNPAIRED: 2}
"""Completions of an example, each of which is a row; an unpaired one has another prompt's completion beside its own."""


@dataclass(frozen=True)
class ReferenceNode:
    """Log-probabilities of one policy on one entry of `data`, or on the records that a stage makes.

    Attributes:
        policy: The stage whose policy is the reference.
        data: The entry, or the stage that makes the records.
        users: Stages that read them, in the order they run.
        state: Whether every row that a stage still needs is in the store, as far as that can be told without a
            tokenizer.
        rows: How many completions they are of; None where only reading the data tells.
        at_most: Whether dropped rows would make them fewer.
        known_after: The stage that has yet to make the records.
    """

    policy: str
    data: str
    users: tuple[str, ...]
    state: Literal["reuse", "run"]
    rows: int | None = None
    at_most: bool = False
    known_after: str | None = None

    @property
    def name(self) -> str:
        return f"{self.policy}@{self.data}"

    @property
    def note(self) -> str:
        return f"reference log-probs of {self.policy} on {self.data}, used by {', '.join(self.users)}"


def reference_nodes(
    graph: Graph, finished: Mapping[str, bool], kept: Mapping[str, Mapping[str, int]], digests: Digests
) -> list[ReferenceNode]:
    """All of them, in the order in which they are first needed.

    Args:
        graph: The recipe.
        finished: Stage -> whether the store has its artifact.
        kept: Stage whose policy is a reference -> `rows_id` of what the store has of it -> number of rows.
        digests: Of data files.
    """
    users: dict[tuple[str, str], list[Node]] = {}
    for node in graph.nodes.values():
        own = isinstance(node.stage, TrainedStage) and engine_of(node.stage) == "align"
        own = own and not isinstance(node.stage, RolloutStage)  # a rollout brings its own
        name = reference_of(node.stage) if own else None
        for data in node.data if name is not None else ():
            users.setdefault((graph.nodes[name].fingerprint, data), []).append(node)  # type: ignore[index]
    nodes: list[ReferenceNode] = []
    made = makers(graph.loaded.stages)
    for (_, data), readers in users.items():
        policy = reference_of(readers[0].stage)
        assert policy is not None
        todo = [each.name for each in readers if not finished[each.name]]
        if data in made and not finished[data]:  # there is no file to look into yet
            names = tuple(each.name for each in readers)
            nodes.append(ReferenceNode(policy, data, names, "run" if todo else "reuse", known_after=data))
            continue
        known = kept.get(policy, {})
        ids = {each.name: rows_id(each.stage, each.data[data], graph.loaded.folder, digests) for each in readers}
        exact = {known.get(id_) for id_ in ids.values()}
        rows = exact.pop() if len(exact) == 1 else None
        nodes.append(
            ReferenceNode(
                policy=policy,
                data=data,
                users=tuple(ids),
                state="reuse" if all(ids[name] in known for name in todo) else "run",
                rows=_rows(readers, data, graph.loaded.folder) if rows is None else rows,
                at_most=rows is None,
            )
        )
    return nodes


def rows_id(stage: Any, source: DataSource, folder: Path, digests: Digests) -> str:
    """What decides which completions a stage asks its reference for, beside tokenizer and reference.

    Args:
        stage: Settings of a training stage.
        source: The entry of `data` that it reads.
        folder: Folder of the recipe.
        digests: Of data files.
    """
    settings = source.model_dump(mode="json")
    if isinstance(source, FileData):
        path = folder / str(resolve_env(source.path))
        settings |= {"path": digests.file(path), "ending": "".join(path.suffixes[-2:])}
    elif isinstance(source, GeneratedData):
        settings["version"] = plugin_version("align.generators", source.generator)
    asked = {"batch": get_method(stage.kind).batch.value, "max_tokens": stage.train.max_tokens, "data": settings}
    return digest_of(asked | {"loss_on": getattr(stage, "loss_on", None)})


def _rows(readers: list[Node], data: str, folder: Path) -> int | None:
    """Rows if none is dropped; stages that make other examples of the data count for themselves, so nothing is told."""
    batches = {get_method(node.stage.kind).batch for node in readers}  # type: ignore[attr-defined]
    if len(batches) > 1 or not batches <= COMPLETIONS.keys():
        return None
    records = count_rows(readers[0].data[data], folder)
    return None if records is None else COMPLETIONS[batches.pop()] * records
