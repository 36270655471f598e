"""Memory of RLHF on one base, beside SFT and beside four models: `python -m bench.rlhf_memory`.

Live tensor memory at the peak of an SFT step, of a PPO step and of a rollout with policy, critic, reference and reward
model on one NF4 base, and of the same PPO step with a base for each of them: all on the same tokens, LoRA adapters,
gradients and Adam's moments included. No figure is printed before losses and gradients of both PPO steps agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from align.models.platform import prepare_process
from align.recipe import build_graph, load_recipe
from align.recipe.plan import make_plan
from align.recipe.seats import UPDATING, drawing_memory
from align.recipe.sizes import ModelSize, size_of_architecture
from align.spec.model import Architecture
from align.training.buffer import Buffer
from bench.memory import peak_bytes
from bench.rlhf_roles import POLICY, TRAINED, Arm, Rollouts, Taken, Task, Updates, given, ppo_updates, sft_updates
from bench.tables import MIB
from bench.worlds import SHAPES, Shape, build_base

LOSS, LOGPS, GRADIENT = 1e-5, 1e-4, 1e-4
"""Most relative difference of losses, of numbers of single tokens, and relative of gradients, on one base and on four.
"""
WANTED = 1.35
"""Most times the memory of an SFT step that a PPO step may take."""
ADAM_MIXED, HALF = 16, 2
"""Bytes of a parameter: trained in mixed precision (bf16 weight and gradient, fp32 copy, two moments), and frozen."""
SFT, PPO, FOUR, DRAWING, SCORING = "SFT step", "PPO step", "PPO step, four bases", "drawing", "scoring"
PARTS = ("base", "adapters", "optimizer", "gradients", "activations")
PLANNED = {"trained weights": "adapters", "frozen adapters": "adapters"} | {part: part for part in PARTS}
"""What the plan calls a part -> what is said here; all else of it are activations."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, measure and tabulate."""
    options = _options(argv)
    prepare_process()
    torch.utils.deterministic.fill_uninitialized_memory = False
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    shape = SHAPES[options.shape].quick() if options.quick else SHAPES[options.shape]
    shape = replace(shape, quantized=True, half=device.type == "cuda", rank=options.rank or shape.rank)
    task = Task(options.prompt, options.completion, options.drawn, options.trained, shape.pack_tokens)
    if options.quick:
        task = Task(24, 8, 8, 4, 64)
    record = {"shape": asdict(shape), "task": asdict(task)} | measure(shape, task, device)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))
    return show(Console(width=None if sys.stdout.isatty() else 160), record)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.rlhf_memory", description=__doc__.split("\n")[0])
    llamas = [name for name, shape in SHAPES.items() if shape.family == "llama"]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=llamas, default="medium", help="always in NF4")
    parser.add_argument("--rank", type=int, help="of the adapters; the shape's if absent")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--drawn", type=int, default=16, help="prompts of a rollout")
    parser.add_argument("--trained", type=int, default=4, help="prompts of an optimizer step")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: the code, not the ratios")
    parser.add_argument("--json", type=Path, help="where all figures go")
    return parser.parse_args(argv)


# Measuring -----------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What RLHF came to with the roles of one arm.

    Attributes:
        rollout: What was drawn and scored.
        taken: Two optimizer steps; in the second the policy is no longer the one that drew.
        phases: Phase -> bytes by part.
        packs: Tokens of each forward pass of a step.
    """

    rollout: Buffer
    taken: list[Taken]
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    packs: list[int] = field(default_factory=list)


def measure(shape: Shape, task: Task, device: torch.device) -> dict[str, Any]:
    """Bytes of every part of every phase, and how far apart one base and four are."""
    base = build_base(shape, device)
    with TemporaryDirectory() as folder:
        work = Path(folder)
        shared = Arm.on_one_base(base, shape, device)
        one = _rlhf(shared, task, work / "one", PPO)
        examples, packing = given(one.rollout.examples()[: task.trained]), shared.packing()
        del shared
        four = _rlhf(Arm.on_four_bases(shape, device), task, work / "four", FOUR)
        plan = _plan(shape, task, device, work / "plan")
    updates = sft_updates(Arm.on_one_base(base, shape, device, [POLICY]), task, packing)
    updates.take(examples)
    sft = _parts(updates, peak_bytes(lambda: updates.take(examples), device))
    parameters = _size(shape).parameters
    return {
        "gate": _apart(one, four),
        "phases": {SFT: sft, **one.phases, FOUR: four.phases[FOUR]},
        "packs": {SFT: updates.packs(examples), PPO: one.packs},
        "plan": plan,
        "parameters": parameters,
        "full copies": {"bf16": 4 * HALF * parameters, "mixed-precision Adam": 2 * (ADAM_MIXED + HALF) * parameters},
    }


def _rlhf(arm: Arm, task: Task, work: Path, name: str) -> Measured:
    """A rollout and three steps on a part of it, the last of them measured, when the moments are there."""
    rollouts, updates = Rollouts(arm, task, work), ppo_updates(arm, task, arm.packing())
    rollouts.prepare(arm.model, 0, updates.step)
    assert rollouts.buffer is not None
    examples = rollouts.examples(0, range(task.trained))
    found = Measured(rollouts.buffer, [updates.take(examples, look=True) for _ in range(2)])
    found.phases[name] = _parts(updates, peak_bytes(lambda: updates.take(examples), arm.device))
    for phase, peak in rollouts.peaks.items():  # with the moments that are there from the second rollout on
        found.phases[phase] = _parts(updates, peak) | {"gradients": 0, "activations": peak}
    found.packs = updates.packs(examples)
    return found


def _parts(updates: Updates, peak: int) -> dict[str, int]:
    """Bytes at the peak of a step, when the gradients of its first packs are there."""
    arm = updates.arm
    sizes = (arm.bases, arm.adapters, updates.states, updates.gradients, peak - updates.gradients)
    return dict(zip(PARTS, sizes, strict=True))


def _apart(one: Measured, four: Measured) -> dict[str, float]:
    """Largest relative differences between one base and four, of rollouts and of steps."""
    a, b = one.rollout, four.rollout
    names = ("scores", "logps", "reference", "values")
    pairs = [(getattr(a.rollout, name), getattr(b.rollout, name)) for name in names]
    pairs.append((a.made.advantages, b.made.advantages))
    found = {
        "completions": float(a.completions != b.completions),
        "tokens": max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs),
    }
    for role in TRAINED:
        found[f"gradient of the {role}"] = max(
            _relative(x, y, role) for x, y in zip(one.taken, four.taken, strict=True)
        )
    losses = [(x.loss, y.loss) for x, y in zip(one.taken, four.taken, strict=True)]
    return found | {"loss": max(abs(x - y) / abs(y) for x, y in losses)}


def _relative(one: Taken, four: Taken, role: str) -> float:
    """NaN where there is nothing to compare, which no limit admits."""
    if one.gradients.keys() != four.gradients.keys():
        return float("nan")
    names = [name for name in sorted(one.gradients) if name.startswith(f"{role}/") == (role != POLICY)]
    a, b = (np.concatenate([each.gradients[n].ravel() for n in names]).astype("float64") for each in (one, four))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def failures(gate: Mapping[str, float]) -> list[str]:
    """What is not equal, in words."""
    limits = {"completions": 0.0, "tokens": LOGPS, "loss": LOSS}
    return [f"{name} {value:.1e}" for name, value in gate.items() if not value <= limits.get(name, GRADIENT)]


# What the plan says --------------------------------------------------------------------------------------------------

RECIPE = """
name: rlhf-memory
model: {{base: base, quantization: nf4, dtype: {dtype}, adapter: {{rank: {rank}, alpha: {rank}}}}}
data:
  texts: {{generator: film-reviews, part: demonstrations, rows: 64, format: prompt_completion}}
  pairs: {{generator: film-reviews, part: preferences, rows: 64, format: pairs}}
stages:
  base:
    kind: pretrain
    data: texts
    architecture:
      {{hidden_size: {hidden}, intermediate_size: {intermediate}, layers: {layers}, heads: {heads},
        kv_heads: {kv_heads}, tie_embeddings: {tied}, max_positions: 4096}}
    tokenizer: {{vocab_size: {vocab}}}
  sft: {{kind: sft, data: texts, train: &train {{{train}}}}}
  rm: {{kind: reward, policy: sft, data: pairs}}
  ppo:
    kind: ppo
    policy: sft
    reference: sft
    reward: rm
    prompts: texts
    prompts_per_rollout: {drawn}
    generation: {{max_new_tokens: {completion}}}
    train: *train
"""


def _plan(shape: Shape, task: Task, device: torch.device, folder: Path) -> dict[str, dict[str, int]]:
    """What `align plan` says of a recipe with these sizes, by part."""
    train = f"global_batch_size: {task.trained}, max_tokens: {task.prompt + task.completion}"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        RECIPE.format(
            **asdict(shape) | asdict(task) | {"tied": str(shape.tied).lower()},
            dtype=str(shape.dtype).removeprefix("torch."),
            train=f"{train}, pack_tokens: {task.pack_tokens}",
        )
    )
    # With one completion at a time drawing is the smaller phase, so what the plan tells is an update.
    loaded = load_recipe(folder / "recipe.yaml", ["stages.ppo.generation.batch_size=1"])
    kind: Any = device.type
    plan = make_plan(build_graph(loaded, folder / "home"), lambda fingerprint: False, device=kind)
    rows = {row.stage: row.memory for row in plan.rows}
    node = build_graph(load_recipe(folder / "recipe.yaml"), folder / "home").nodes["ppo"]
    stays = {name: bytes_ for name, bytes_ in rows["ppo"].items() if name not in UPDATING}
    drawing = drawing_memory(node, _size(shape), shape.dtype.itemsize)
    told = {SFT: rows["sft"], PPO: rows["ppo"], DRAWING: stays | drawing}
    return {phase: _by_part(parts) for phase, parts in told.items()}


def _by_part(planned: Mapping[str, int]) -> dict[str, int]:
    found = dict.fromkeys(PARTS, 0)
    for name, bytes_ in planned.items():
        found[PLANNED.get(name, "activations")] += bytes_
    return found


def _size(shape: Shape) -> ModelSize:
    architecture = Architecture(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        tie_embeddings=shape.tied,
    )
    return size_of_architecture(architecture, shape.vocab)


# Telling -------------------------------------------------------------------------------------------------------------


def show(console: Console, record: Mapping[str, Any]) -> int:
    """The table, or why there is none; the exit code."""
    failed, gate = failures(record["gate"]), record["gate"]
    for failure in failed:
        console.print(f"[red]gate failed, so no memory is told: one base and four differ in {failure}")
    if failed:
        return 1
    console.print("gate passed, one base beside four: " + ", ".join(f"{n} {v:.1e}" for n, v in gate.items()))
    phases, plan, task = record["phases"], record["plan"], record["task"]
    columns = []
    for name in (SFT, PPO, DRAWING, SCORING, FOUR):
        columns.append((name, phases[name]))
        columns += [("plan", plan[name])] if name in plan else []
    shape = record["shape"]
    table = Table(
        title=f"{shape['name']}, NF4, rank {shape['rank']}, {task['prompt']} + {task['completion']} tokens: "
        f"{task['drawn']} prompts drawn side by side, {task['trained']} of them in a step; live MiB at the peak"
    )
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for part in PARTS:
        table.add_row(part, *(f"{parts[part] / MIB:,.1f}" for _, parts in columns))
    table.add_row("all", *(f"{sum(parts.values()) / MIB:,.1f}" for _, parts in columns))
    console.print(table)
    console.print("packs of a step: " + "; ".join(f"{name} {packs}" for name, packs in record["packs"].items()))
    _ratios(console, record)
    return 0


def _ratios(console: Console, record: Mapping[str, Any]) -> None:
    total = {name: sum(parts.values()) for name, parts in record["phases"].items()}
    states = {
        name: sum(parts[part] for part in ("base", "adapters", "optimizer")) for name, parts in record["phases"].items()
    }
    weights = record["phases"][PPO]["base"] + record["phases"][PPO]["adapters"]
    console.print(f"the base is {record['phases'][PPO]['base'] / weights:.0%} of the weights of a PPO step on one base")
    ratio = total[PPO] / total[SFT]
    style = "" if ratio <= WANTED else "[yellow]"
    console.print(f"{style}PPO step / SFT step: {ratio:.2f}, wanted at most {WANTED}; without activations "
                  f"{states[PPO] / states[SFT]:.2f}")  # fmt: skip
    console.print(
        f"four bases / one: {total[FOUR] / total[PPO]:.2f}; without activations {states[FOUR] / states[PPO]:.2f}"
    )
    for phase in (DRAWING, SCORING):
        console.print(f"{phase} / SFT step: {total[phase] / total[SFT]:.2f}")
    for name, bytes_ in record["full copies"].items():
        console.print(f"four full copies in {name}, without activations: {bytes_ / MIB:,.1f} MiB")


if __name__ == "__main__":
    sys.exit(main())
