"""Token statistics of a recipe's data, counted by a process of its own: tokenizers are no business of this one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from align.recipe import Graph
from align.runner.job import make_job
from align.runner.launch import environment, error_class
from align.spec.stages import TrainedStage


def count_tokens(graph: Graph, home: Path) -> dict[str, dict[str, Any]]:
    """What every training stage makes of its data.

    Returns:
        Stage -> `data` (the entry's name) and either `report` (a `DataReport`) or `known_after` (the stage whose work
        the tokenizer is).

    Raises:
        AlignError: The data cannot be read, or the tokenizer cannot be loaded.
    """
    nodes = [node for node in graph.nodes.values() if isinstance(node.stage, TrainedStage)]
    with TemporaryDirectory(prefix="align-") as folder:
        paths = []
        for number, node in enumerate(nodes):
            path = Path(folder) / f"{number}.json"
            path.write_text(make_job(graph, node, home=home, work=Path(folder)).model_dump_json())
            paths.append(str(path))
        done = subprocess.run(
            [sys.executable, "-m", "align.stages.inspect", *paths],
            env=environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        told = re.search(r"^error: (.*)", done.stderr, flags=re.MULTILINE | re.DOTALL)
        raise error_class(done.returncode)(
            told[1].strip() if told else f"the count failed:\n{done.stderr[-2000:]}", where="align plan --tokens"
        )
    return json.loads(done.stdout)
