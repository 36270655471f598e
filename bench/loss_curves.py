"""align and TRL on the same recipe: `python -m bench.loss_curves`.

Every kind that both can train runs under `engine: align` and `engine: trl` from the same parent, with the same data,
order, seed and initial weights, on a tiny model: NF4 with an adapter, and every parameter. Prints the losses of
all steps side by side, for kinds on rollouts the mean scores too, and ends with exit code 1 if a curve leaves its
tolerance. Weights that differ by rounding may draw another token some day; runs are compared up to there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from align.artifacts.store import Store
from align.recipe import Graph, build_graph, load_recipe
from align.recipe.rules import check_rules
from align.runner.job import make_job

RECIPE = """
name: loss-curves
model: {base: base, quantization: nf4, adapter: {kind: lora, rank: 8, alpha: 16, targets: all-linear}}
data:
  corpus: {generator: film-reviews, part: corpus, format: prompt_completion, rows: 400}
  demonstrations: {generator: film-reviews, part: demonstrations, format: prompt_completion, rows: 150}
  preferences: {generator: film-reviews, part: preferences, format: pairs, rows: 150}
  labels: {generator: film-reviews, part: preferences, format: pairs, convert: unpaired, rows: 75}
stages:
  base:
    kind: pretrain
    data: corpus
    architecture: {hidden_size: 64, intermediate_size: 128, layers: 2, heads: 4, max_positions: 256}
    tokenizer: {vocab_size: 400}
    train: {max_steps: 40, global_batch_size: 8, learning_rate: 3e-3, max_tokens: 256}
  parent:
    kind: sft
    data: demonstrations
    train: &train
      max_steps: 30
      global_batch_size: 8
      learning_rate: 1e-2
      warmup_ratio: 0.1
      weight_decay: 0.01
      max_tokens: 256
      log_every_steps: 1
      pack_tokens: 1024
  sft: {kind: sft, data: demonstrations, train: {<<: *train, seed: 1}}
  dpo: {kind: dpo, policy: parent, reference: parent, data: preferences, beta: 0.1, train: *train}
  kto:
    kind: kto
    policy: parent
    reference: parent
    data: labels
    beta: 0.1
    desirable_weight: 1.2
    train: {<<: *train, learning_rate: 2e-3}
  reward: {kind: reward, policy: parent, data: preferences, centring: 0.01, train: *train}
  rloo: &online
    kind: rloo
    policy: parent
    reference: parent
    reward: reward
    scorers: [film-reviews]
    prompts: demonstrations
    completions: 4
    prompts_per_rollout: 8
    epochs_per_rollout: 2
    generation: {max_new_tokens: 40}
    train: {<<: *train, max_steps: 20, global_batch_size: 4, learning_rate: 2e-3}
  grpo: {<<: *online, kind: grpo}
"""
FULL = (
    "model.quantization=none",
    "model.adapter=none",
    *(f"stages.{name}.train.learning_rate=5e-4" for name in ("parent", "sft", "dpo", "kto", "reward", "rloo", "grpo")),
    "stages.rloo.reference=null",
    "stages.grpo.reference=null",
)
KINDS = ("sft", "dpo", "kto", "reward", "rloo", "grpo")
TOLERANCE = {"sft": 1e-4, "dpo": 1e-4, "kto": 1e-4, "reward": 1e-4, "rloo": 1e-4, "grpo": 1e-4}
"""Largest difference of a loss that fp32 sums in another order may make over such a run."""
SCORE = "rollout/score"
SAME_SCORE = 1e-3
"""Mean scores of the same completions differ by less."""


@dataclass(frozen=True)
class Curve:
    """What a stage logged, step by step, and of every rollout."""

    lines: list[dict[str, float]]
    rollouts: list[dict[str, float]] = field(default_factory=list)

    def of(self, name: str = "loss") -> list[float]:
        return [line[name] for line in self.lines if name in line]

    def until(self, step: float) -> Curve:
        """What was logged of the first optimizer steps."""
        return Curve([line for line in self.lines if line["step"] <= step], self.rollouts)


def run_stage(graph: Graph, name: str, home: Path) -> Path:
    """Run a stage and what it needs in this process, unless the store has it; the folder of its artifact."""
    from align.stages.worker import Reporter, run

    store = Store(home)
    for node in graph.upto(name).nodes.values():
        if store.find(node.fingerprint) is None:
            job = make_job(graph, node, home=home, work=store.work(node.fingerprint))
            with store.lock(node.fingerprint, node.name):
                run(job, Reporter(Path(job.work)))
    return store.get(graph.nodes[name].fingerprint).folder


def curve(recipe: Path, name: str, home: Path, *overrides: str) -> tuple[Curve, Path]:
    """What a stage of a recipe logs, and its artifact."""
    graph = build_graph(load_recipe(recipe, overrides), home)
    check_rules(graph)
    folder = run_stage(graph, name, home)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Curve([line for line in lines if "loss" in line], [line for line in lines if SCORE in line]), folder


def both(recipe: Path, name: str, home: Path, *overrides: str) -> tuple[Curve, Curve]:
    """The curves of a stage under align and under TRL."""
    align, _ = curve(recipe, name, home, *overrides)
    trl, _ = curve(recipe, name, home, *overrides, f"stages.{name}.engine=trl")
    return align, trl


def largest(one: list[float], other: list[float]) -> float:
    """The largest difference of two curves of the same length."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def parted(one: Curve, other: Curve) -> float:
    """The optimizer step from which on two runs learn from other completions; infinity if they never do."""
    for a, b in zip(one.rollouts, other.rollouts, strict=True):
        if a["rollout/length"] != b["rollout/length"] or abs(a[SCORE] - b[SCORE]) > SAME_SCORE:
            return a["step"]
    return math.inf


def tabulated(title: str, name: str, align: list[dict[str, float]], trl: list[dict[str, float]]) -> Table:
    """One number of every line under both engines."""
    table = Table(title=title)
    for column in ("step", "align", "trl", "difference"):
        table.add_column(column, justify="right")
    for line, other in zip(align, trl, strict=True):
        a, b = line[name], other[name]
        table.add_row(str(line["step"]), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}")
    return table


def main() -> int:
    """Run and tabulate."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    chosen, console, failed = parser.parse_args(), Console(), []
    os.environ["OMP_NUM_THREADS"] = "1"  # a model this small is not faster on more, and much slower beside others
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recipe, home = Path(folder) / "recipe.yaml", Path(folder) / "home"
        recipe.write_text(RECIPE)
        for kind in chosen.kinds:
            for model, overrides in {"NF4 + LoRA": (), "full": FULL}.items():
                align, trl = both(recipe, kind, home, *overrides)
                console.print(tabulated(f"{kind}, {model}", "loss", align.lines, trl.lines))
                if align.rollouts:
                    console.print(tabulated("mean score", SCORE, align.rollouts, trl.rollouts))
                apart = parted(align, trl)
                worst = largest(align.until(apart).of(), trl.until(apart).of()) if apart else math.inf
                told = f"{kind}, {model}: largest difference {worst:.1e}, tolerance {TOLERANCE[kind]:.0e}"
                told += f", up to step {apart}, when another token was drawn" if apart < math.inf else ""
                console.print(told)
                failed += [told] if worst > TOLERANCE[kind] else []
    for told in failed:
        console.print(f"[red]{told}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
