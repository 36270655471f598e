"""What learns from its own completions, under several seeds, and its control: `python -m bench.quickstart_rlhf`.

For each seed `recipes/quickstart/on_policy.yaml` is run: gold reward of every candidate on held-out prompts with its
interval, KL to SFT and length; and once more with a reward model whose labels were decided by a coin, from which
nothing can be gained. `--recipe rlhf` runs PPO alone. Ends with a table and with exit code 1 if a method does not end
above SFT with intervals apart, or gains from the coin.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import align
from bench.seeds import interval, overrides

RECIPES = Path(__file__).parents[1] / "recipes" / "quickstart"
COIN = "data.comparisons.options={shuffle_labels: true}"
NOT_JUDGED = ("base", "sft")


def run(recipe: Path, seed: int, coin: bool) -> dict[str, Mapping[str, Any]]:
    """What the comparison says of every candidate."""
    sets = overrides(recipe, seed, "-coin" * coin) + [COIN] * coin
    return dict(align.run(recipe, sets).results()["comparison"]["candidates"])


def main() -> int:
    """Run and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", choices=["on_policy", "rlhf"], default="on_policy")
    parser.add_argument("--no-control", action="store_true", help="leave out the coin")
    args = parser.parse_args()
    recipe, console, failures = RECIPES / f"{args.recipe}.yaml", Console(), []
    table = Table(title="Gold reward on held-out prompts, mean [95 % interval]; KL to SFT in nats, length in tokens")
    for column in ("seed", "", "gold", "KL", "length", "gold, reward model of a coin"):
        table.add_column(column)
    for seed in args.seeds:
        found = run(recipe, seed, coin=False)
        control = {} if args.no_control else run(recipe, seed, coin=True)
        for name, own in found.items():
            other = control.get(name) if name not in NOT_JUDGED else None
            means = [f"{own[metric]['mean']:.{digits}f}" for metric, digits in (("kl", 1), ("length", 0))]
            table.add_row(str(seed), name, interval(own["gold"]), *means, interval(other["gold"]) if other else "")
            sft = found["sft"]["gold"]
            if name not in NOT_JUDGED and own["gold"]["low"] <= sft["high"]:
                failures.append(f"seed {seed}: {name} is not clearly above SFT")
            if other and other["gold"]["low"] > sft["high"]:
                failures.append(f"seed {seed}: {name} gains from a reward model that knows nothing")
    console.print(table)
    for failure in failures:
        console.print(f"[red]{failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
