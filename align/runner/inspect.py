"""Looks at data through a process of its own: tokenizers are no business of this one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from align.errors import RecipeError
from align.recipe import Graph, Node
from align.recipe.made import RECORDS, makers
from align.recipe.suggest import did_you_mean
from align.runner.job import make_job
from align.runner.launch import environment, error_class
from align.spec.stages import TrainedStage

View = Literal["preview", "mask", "check"]


def count_tokens(graph: Graph, home: Path) -> dict[str, dict[str, Any]]:
    """What every training stage makes of its data.

    Args:
        graph: The recipe.
        home: Root of the store, which has the tokenizers of finished stages.

    Returns:
        Stage -> `data` (the entry's name) and either `report` (a `DataReport`) or `known_after` (the stage that has yet
        to make the tokenizer or the records).

    Raises:
        AlignError: The data cannot be read, or the tokenizer cannot be loaded.
    """
    nodes = [node for node in graph.nodes.values() if isinstance(node.stage, TrainedStage)]
    with job_files(graph, nodes, home) as paths:
        done = _inspect("count", *paths, capture=True)
    if done.returncode:
        told = re.search(r"^error: (.*)", done.stderr, flags=re.MULTILINE | re.DOTALL)
        message = told[1].strip() if told else f"the count failed:\n{done.stderr[-2000:]}"
        raise error_class(done.returncode)(message, where="align plan --tokens")
    return json.loads(done.stdout)


def show_data(view: View, graph: Graph, data: str, *, home: Path, stage: str | None = None, rows: int = 3) -> int:
    """Print one entry of `data` as a stage reads it.

    Args:
        view: Records, trained tokens, or what became of the rows.
        graph: The recipe.
        data: The entry.
        home: Root of the store.
        stage: Which stage; the first one that reads the entry if absent.
        rows: How many rows or examples.

    Returns:
        The exit code; errors of the data itself have been printed.

    Raises:
        RecipeError: There is no such entry, no such stage, or the stage does not read it.
    """
    node = stage_reading(graph, data, stage)
    with job_files(graph, [node], home) as paths:
        return _inspect(view, *paths, "--data", data, "--rows", str(rows)).returncode


def stage_reading(graph: Graph, data: str, stage: str | None) -> Node:
    """The stage that is meant: the one that is named, or the first that reads this entry of `data`, or these records.

    Raises:
        RecipeError: There is no such entry, no such stage, or the stage does not read it.
    """
    made = makers(graph.loaded.stages)
    known = [*graph.loaded.recipe.data, *made]
    if data not in known:
        raise RecipeError(
            f"the recipe has no data `{data}`{did_you_mean(data, known)}", fix=f"one of: {', '.join(known)}"
        )
    readers = {node.name: node for node in graph.nodes.values() if data in node.data}
    if not readers:
        raise RecipeError(
            f"no stage reads what `{data}` makes",
            where=f"data {data}",
            fix=f"look into runs/{graph.loaded.recipe.name}/{data}/{RECORDS} once it has run, or name it in a stage",
        )
    if stage is None:
        return next(iter(readers.values()))
    if stage not in readers:
        what = f"stage `{stage}` does not read it" if stage in graph.nodes else f"the recipe has no stage `{stage}`"
        raise RecipeError(what, where=f"--stage: data {data}", fix=f"one of: {', '.join(readers)}")
    return readers[stage]


@contextmanager
def job_files(graph: Graph, nodes: Sequence[Node], home: Path) -> Iterator[list[str]]:
    """Files with the jobs of these stages. Each knows the whole of `data`, to find prompts that two entries share."""
    with TemporaryDirectory(prefix="align-") as folder:
        paths = []
        for number, node in enumerate(nodes):
            job = make_job(graph, node, home=home, work=Path(folder))
            job = job.model_copy(update={"data": {**graph.loaded.recipe.data, **job.data}})
            path = Path(folder) / f"{number}.json"
            path.write_text(job.model_dump_json())
            paths.append(str(path))
        yield paths


def _inspect(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "align.stages.inspect", *arguments],
        env=environment(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=capture,
        text=True,
        check=False,
    )
