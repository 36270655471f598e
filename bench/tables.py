"""Tables of a comparison, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.verdict import Line

MIB = 2**20


def print_machine(console: Console, machine: Mapping[str, Any], notes: Mapping[str, str]) -> None:
    """Where this runs, with what, and what the arms are."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(f"{machine['processor']}, {machine['threads']} threads; {versions}")
    for name, note in notes.items():
        console.print(f"  {name}: {note}")
    console.print(
        "  live MiB: most bytes of tensors at once during a step, beyond weights; times are medians of rounds in turns"
    )


def print_case(console: Console, case: Mapping[str, Any]) -> None:
    """Times, speeds and memory of all arms of a case, and what each technique brings."""
    unit = "prompts" if case["kind"] == "rrhf" else "pairs"
    table = Table(title=f"{case['shape']}, {case['case']}: {case['tokens']} tokens of {case['examples']} {unit}")
    for name in (
        "arm",
        "passes",
        "s",
        "from, to",
        "tokens/s",
        f"{unit}/s",
        "live MiB",
        "GFLOP",
        "of a product",
        "beside ours",
    ):
        table.add_column(name, justify="left" if name in ("arm", "passes") else "right")
    for name, arm in case["arms"].items():
        low, high = arm["spread"]
        table.add_row(
            name,
            arm["passes"],
            f"{arm['median']:.3f}",
            f"{low:.3f}, {high:.3f}",
            f"{arm['tokens_per_second']:,.0f}",
            f"{arm['examples_per_second']:.2f}",
            f"{arm['peak_bytes'] / MIB:,.1f}",
            f"{arm['flops']['total'] / 1e9:,.0f}",
            f"{arm['of_product']:.0%}",
            "" if name == "ours" else f"{case['ratios'][f'{name} / ours']:.2f}x",
        )
    console.print(table)
    for name, each in case["references"].items():
        share = each["seconds"] / case["arms"][name]["median"]
        console.print(
            f"  reference, once per run, {name}: {each['seconds']:.3f} s for these examples, {share:.0%} of a step"
        )
    print_gains(console, case)


def print_gains(console: Console, case: Mapping[str, Any]) -> None:
    """Measured beside arithmetic."""
    table = Table(title=f"{case['shape']}, {case['case']}: what it brings, measured and by the operations")
    for name in ("what", "without, with", "measured", "operations", "share"):
        table.add_column(name, justify="left" if name in ("what", "without, with") else "right")
    for gain in case["gains"]:
        table.add_row(
            gain["what"],
            f"{gain['slow']}, {gain['fast']}",
            f"{gain['measured']:.2f}x",
            f"{gain['promised']:.2f}x",
            f"{gain['share']:.0%}",
        )
    console.print(table)


def print_gate(console: Console, case: Mapping[str, Any]) -> None:
    """One line if it is passed, and what is wrong if it is not."""
    where = f"{case['shape']}, {case['case']}"
    for failure in case["failures"]:
        console.print(f"[red]{where}: gate failed, so nothing is timed: {failure}")
    if case["failures"]:
        return
    for precision, distances in case["gate"].items():
        worst = {what: max(d[what] for d in distances.values()) for what in ("loss", "values", "gradient")}
        told = ", ".join(f"{what} {value:.1e}" for what, value in worst.items())
        console.print(f"{where}: gate passed in {precision}, {len(distances)} arms; at most {told} from plain")
    for name, reason in case["left_out"].items():
        console.print(f"[yellow]{where}: {name} is left out: {reason}")


def print_verdict(console: Console, lines: Sequence[Line]) -> None:
    """Wanted and found."""
    table = Table(title="Wanted and found; of memory and arithmetic the worst case")
    for name in ("shape", "case", "what", "wanted", "found", ""):
        table.add_column(name, justify="right" if name in ("wanted", "found") else "left")
    for line in lines:
        sign = "at least" if line.more_is_better else "below"
        style = None if line.reached else "yellow"
        table.add_row(
            line.shape, line.case, line.what, f"{sign} {line.wanted:.2f}", f"{line.found:.2f}", line.words, style=style
        )
    console.print(table)
    missed = sum(not line.reached for line in lines)
    console.print(f"{len(lines) - missed} of {len(lines)} wanted ratios reached")
