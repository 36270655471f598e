"""The quickstart under several seeds, and its control: `python -m bench.quickstart_seeds`.

For each seed: gold reward of base, SFT and DPO on held-out prompts, and DPO with the labels of every preference
decided by a coin. The control starts from the same SFT stage, which the store reuses. Ends with a table and with exit
code 1 if an ordering that README claims does not hold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import align
from bench.seeds import interval, overrides

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart" / "sft_dpo.yaml"
SHUFFLED = "data.preferences.options={shuffle_labels: true}"


def main() -> int:
    """Run and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    console = Console()
    table = Table(title="Gold reward on held-out prompts, mean [95 % interval]")
    for column in ("seed", "base", "sft", "dpo", "dpo, shuffled labels"):
        table.add_column(column)
    failures = []
    for seed in parser.parse_args().seeds:
        gold = {}
        for shuffled in (False, True):
            sets = overrides(RECIPE, seed, "-shuffled" * shuffled) + [SHUFFLED] * shuffled
            result = align.run(RECIPE, sets)
            candidates = result.results()["comparison"]["candidates"]
            gold |= {f"{name} shuffled" if shuffled else name: c["gold"] for name, c in candidates.items()}
        cells = [interval(gold[name]) for name in ("base", "sft", "dpo", "dpo shuffled")]
        table.add_row(str(seed), *cells)
        if not gold["base"]["high"] < gold["sft"]["low"]:
            failures.append(f"seed {seed}: SFT is not clearly above base")
        if not gold["sft"]["high"] < gold["dpo"]["low"]:
            failures.append(f"seed {seed}: DPO is not clearly above SFT")
        if not gold["dpo shuffled"]["low"] < gold["sft"]["high"]:
            failures.append(f"seed {seed}: DPO gains with shuffled labels")
    console.print(table)
    for failure in failures:
        console.print(f"[red]{failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
