"""Preference training beside TRL, and each technique beside its absence: `python -m bench.preference`.

Ratios are measured side by side in one process, the arms in turns, after a gate that every arm computes the same. The
figures are those of random models of fixed shapes; the only exit code but 0 is 1, for a gate that failed.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import gc
import json
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from align.models.platform import prepare_process
from bench.arms import NOTES, Arm, Ours, forget, our_arms, plain_rows, small_packs
from bench.clock import Times, in_turns, product_flops, ratio, seconds
from bench.gate import Gate, Result, judge, measured, plain
from bench.peers import NOTES as PEER_NOTES
from bench.peers import Peer, peers
from bench.tables import print_case, print_gate, print_machine, print_verdict
from bench.verdict import gains, lines
from bench.worlds import CASES, SHAPES, Case, Shape, World, build_base

DEFAULTS = {"cpu": ["small", "medium"], "cuda": ["qwen-0.5b", "qwen-1.5b", "llama-8b"]}
PACKAGES = ("align", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run and tabulate."""
    options = _options(argv)
    prepare_process()
    torch.utils.deterministic.fill_uninitialized_memory = False
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    console = Console(width=None if sys.stdout.isatty() else 160)
    record: dict[str, Any] = {"machine": _machine(device), "shapes": {}, "cases": []}
    print_machine(console, record["machine"], NOTES | PEER_NOTES)
    timed: list[dict[str, Any]] = []
    for name in options.shape or DEFAULTS[options.device]:
        shape = SHAPES[name].quick() if options.quick else SHAPES[name]
        shape = replace(shape, repeats=options.repeats or shape.repeats)
        bench = Bench(shape, device, ablations=options.ablations, timed=not options.gate)
        record["shapes"][name] = asdict(shape) | {"product_flops": bench.product}
        console.print(f"{name}: a product of this run gives {bench.product / 1e12:.3f} TFLOP/s in {shape.dtype}")
        for case in options.case or CASES:
            found = bench.run(CASES[case])
            record["cases"].append(found)
            print_gate(console, found)
            if "arms" in found:
                print_case(console, found)
                timed.append(found)
    verdict = lines(timed)
    record["verdict"] = [asdict(line) | {"reached": line.reached} for line in verdict]
    if timed:
        print_verdict(console, verdict)
    if options.quick:
        console.print("[yellow]--quick: these times and ratios mean nothing")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))
    return 1 if any(case["failures"] for case in record["cases"]) else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.preference", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=sorted(DEFAULTS), default="cpu")
    parser.add_argument(
        "--shape", action="append", choices=list(SHAPES), help="may be repeated; all of the device if absent"
    )
    parser.add_argument("--case", action="append", choices=list(CASES), help="may be repeated; all if absent")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: the code, not the times")
    parser.add_argument("--gate", action="store_true", help="only the gate, no times")
    parser.add_argument("--repeats", type=int, help="timed rounds")
    parser.add_argument("--ablations", choices=("auto", "all", "none"), default="auto", help="auto: as the shape says")
    parser.add_argument("--json", type=Path, help="where all figures go")
    return parser.parse_args(argv)


class Bench:
    """Runs cases on one shape.

    Args:
        shape: Of the model.
        device: Where.
        ablations: `all`, `none`, or `auto` for the cases that the shape names.
        timed: Whether a case that passes the gate is timed.
    """

    def __init__(self, shape: Shape, device: torch.device, *, ablations: str = "auto", timed: bool = True) -> None:
        self.shape, self.device, self.ablations, self.timed = shape, device, ablations, timed
        self.product = product_flops(device, shape.dtype, 256 if shape.scale > 1 else None)
        self.base = build_base(shape, device)
        self.batches: dict[tuple[str, float], int] = {}
        """Kind and spread of lengths -> the batch that TRL is fastest with, looked for once."""

    def run(self, case: Case) -> dict[str, Any]:
        """Gate, then times; every figure of the case."""
        before = torch.are_deterministic_algorithms_enabled()
        try:
            return self._run(case)
        finally:
            torch.use_deterministic_algorithms(before)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _run(self, case: Case) -> dict[str, Any]:
        record: dict[str, Any] = {"shape": self.shape.name, "case": case.name, "kind": case.kind, "gate": {}}
        record |= {"failures": [], "left_out": {}}
        if self.shape.quantized:
            exact = self.shape.exact()
            world = World(exact, case, self.device, build_base(exact, self.device))
            self._gate(world, self._arms(world), record, "fp32")
        if not record["failures"]:
            world = World(self.shape, case, self.device, self.base)
            arms = self._arms(world)
            results = self._gate(world, arms, record, "bf16" if self.shape.quantized else "fp32")
            if self.timed and not record["failures"]:
                self._time(world, [arm for arm in arms if arm.name in results], results, record)
        return record

    def _arms(self, world: World) -> list[Arm]:
        wanted = self.ablations == "all" or (self.ablations == "auto" and self.shape.ablates(world.case.name))
        ours = our_arms(world, ablations=wanted)
        if world.case.kind == "rrhf":
            return [plain_rows(world, ours[0]), *ours]
        key = (world.case.kind, world.case.cv)
        if not self.timed or world.base is not self.base:
            return [*peers(world, len(world.examples)), *ours]
        others = peers(world, self.batches.get(key))
        self.batches[key] = batch = others[1].batch
        fewer = [small_packs(world, ours[0], batch)] if batch < max(map(len, ours[0].groups)) else []
        return [*others, ours[0], *fewer, *ours[1:]]

    def _gate(self, world: World, arms: Sequence[Arm], record: dict[str, Any], precision: str) -> dict[str, Result]:
        results: dict[str, Result] = {}
        expected = plain(world)
        for arm in arms:
            self._settle(arm)
            try:
                results[arm.name] = measured(arm, self.device)
            except torch.OutOfMemoryError:
                forget(arm)
                record["left_out"][arm.name] = "it does not fit into memory"
        if "ours" not in results:
            record["failures"].append("ours does not fit into memory")
            return results
        beside = [arm.name for arm in arms if isinstance(arm, Peer) and arm.name in results]
        gate: Gate = judge(expected, results, beside, exact=precision == "fp32")
        record["gate"][precision] = {name: asdict(distance) for name, distance in gate.distances.items()}
        record["failures"] += gate.failures
        return results

    def _settle(self, arm: Arm) -> None:
        """Deterministic operations belong to align on a CPU; TRL's user has none."""
        torch.use_deterministic_algorithms(arm.deterministic and self.device.type == "cpu")

    def _once(self, arm: Arm) -> float:
        self._settle(arm)
        with arm.switched():
            taken = seconds(arm.step, self.device)
        forget(arm)
        return taken

    def _time(self, world: World, arms: Sequence[Arm], results: Mapping[str, Result], record: dict[str, Any]) -> None:
        times = in_turns({arm.name: lambda arm=arm: self._once(arm) for arm in arms}, self.shape.repeats)
        record |= {"tokens": world.tokens, "examples": len(world.examples)}
        record["arms"] = {arm.name: self._figures(world, arm, times[arm.name], results[arm.name]) for arm in arms}
        record["ratios"] = {f"{a} / {b}": ratio(times[a], times[b]) for a in times for b in times if a != b}
        record["gains"] = [asdict(g) | {"share": g.share} for g in gains(record["arms"], record["ratios"])]
        record["references"] = self._references(world, arms)

    def _figures(self, world: World, arm: Arm, times: Times, result: Result) -> dict[str, Any]:
        flops = arm.flops()
        return {
            "passes": arm.passes,
            "seconds": list(times.seconds),
            "median": times.median,
            "spread": times.spread,
            "tokens_per_second": world.tokens / times.median,
            "examples_per_second": len(world.examples) / times.median,
            "peak_bytes": result.peak,
            "flops": asdict(flops) | {"total": flops.total},
            "of_product": flops.total / times.median / self.product,
        }

    def _references(self, world: World, arms: Sequence[Arm]) -> dict[str, Any]:
        """What computing the reference once costs: it is no part of a step."""
        if world.case.kind != "dpo":
            return {}
        chosen = [arm for arm in arms if arm.name in ("ours", "trl tuned") and isinstance(arm, Ours | Peer)]

        def once(arm: Any) -> float:
            self._settle(arm)
            with arm.switched():
                return seconds(arm.reference, self.device)

        times = in_turns({arm.name: lambda arm=arm: once(arm) for arm in chosen}, min(2, self.shape.repeats))
        return {arm.name: {"seconds": times[arm.name].median, "flops": arm.reference_flops().total} for arm in chosen}


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        told = Path("/proc/cpuinfo")
        rows = told.read_text().splitlines() if told.exists() else []
        processor = next(
            (row.split(":")[1].strip() for row in rows if row.startswith("model name")), platform.machine()
        )
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": versions}


if __name__ == "__main__":
    sys.exit(main())
