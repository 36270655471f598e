"""Every preference method from one SFT policy, under several seeds: `python -m bench.quickstart_methods`.

For each seed `recipes/quickstart/methods.yaml` is run: gold reward of every candidate on held-out prompts with its
interval, the held-out accuracy of the reward model, and how often the reference was computed. Ends with a table; a
method whose interval does not lie above SFT's is told, and is no failure of the command: it is the result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import align
from bench.seeds import interval, overrides

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart" / "methods.yaml"
LABEL_NOISE = 0.1
"""Share of wrong labels in the recipe, and so what no reward model can get right but by chance."""


def reference_cost(result: align.RunResult) -> dict[str, tuple[int, int]]:
    """Stage -> rows of the reference that it computed and that it found."""
    costs = {}
    for name, stage in result.stages.items():
        metrics = json.loads((stage.artifact / "manifest.json").read_text())["metrics"]
        if "reference/computed" in metrics:
            costs[name] = (int(metrics["reference/computed"]), int(metrics["reference/reused"]))
    return costs


def main() -> int:
    """Run and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    console = Console()
    gold: dict[str, list[Mapping[str, Any]]] = {}
    rewards, costs = [], []
    for seed in seeds:
        result = align.run(RECIPE, overrides(RECIPE, seed))
        for name, own in result.results()["comparison"]["candidates"].items():
            gold.setdefault(name, []).append(own)
        rewards.append(json.loads((result.stages["reward"].artifact / "evaluation.json").read_text()))
        costs.append(reference_cost(result))
    table = Table(title="Gold reward on held-out prompts, mean [95 % interval]; KL to SFT in nats, length in tokens")
    for column in ("", *(f"seed {seed}" for seed in seeds), "KL", "length", "above SFT"):
        table.add_column(column)
    for name, own in gold.items():
        above = [c["gold"]["low"] > sft["gold"]["high"] for c, sft in zip(own, gold["sft"], strict=True)]
        means = [
            ", ".join(f"{c[metric]['mean']:.{digits}f}" for c in own) for metric, digits in (("kl", 1), ("length", 0))
        ]
        told = "" if name in ("base", "sft") else f"{sum(above)} of {len(above)}"
        table.add_row(name, *(interval(c["gold"]) for c in own), *means, told)
    console.print(table)
    for seed, reward, cost in zip(seeds, rewards, costs, strict=True):
        accuracy = reward["accuracy"]
        console.print(
            f"seed {seed}: reward model right on {interval(accuracy)} of held-out pairs (labels are on "
            f"{1 - LABEL_NOISE:.1f}); reference rows computed and found: {cost}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
