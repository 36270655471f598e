"""What this machine has, what will not work on it and why, and what has never been tried on hardware like it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.artifacts.lock import is_locked, locked
from align.artifacts.manifest import hardware
from align.artifacts.seal import write_atomic
from align.artifacts.store import Store
from align.errors import AlignError, LaunchError
from align.runner.launch import environment

State = Literal["ok", "note", "broken"]

OLDEST_PYTHON = (3, 11)
LITTLE_DISK = 10 * 2**30
"""Bytes below which the store may fill up during a run of real models."""
PROBE_SECONDS = 180
REQUIRED_PROBES = ("torch", "bitsandbytes", "peft", "datasets")
"""Libraries that are tried, not only looked up; peft imports transformers and accelerate."""
STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "broken": "bold red"}

CPU_FLAGS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}
"""Flags of /proc/cpuinfo that decide how fast the CPU computes, and their names."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: Its name.
        state: `broken` is what align cannot run without; a `note` limits what a recipe may ask for.
        found: What is there.
        meaning: What follows from it, or how to mend it.
    """

    what: str
    state: State
    found: str
    meaning: str = ""


def examine(console: Console) -> list[Finding]:
    """Look at everything and print it.

    Raises:
        LaunchError: Something that every run needs is broken.
    """
    with console.status("trying the libraries"):
        findings = diagnose(Store().home)
    console.print(doctor_table(findings))
    if broken := [finding for finding in findings if finding.state == "broken"]:
        raise LaunchError(
            "this machine cannot run align: " + "; ".join(f"{each.what}: {each.found}" for each in broken),
            fix="; ".join(dict.fromkeys(each.meaning for each in broken if each.meaning)) or None,
        )
    return findings


def diagnose(home: Path) -> list[Finding]:
    """Everything that matters, in the order of the table.

    Args:
        home: Root of the store.
    """
    names = [name for name in (*REQUIRED_PROBES, "deepspeed") if importlib.util.find_spec(name)]
    probes = run_probes([*names, *(["methods"] if entry_points(group="align.methods") else [])])
    plugged = probes.pop("methods", {})
    return [
        *_python(),
        *packages(requires("align") or []),
        *libraries(probes),
        *method_plugins(plugged),
        *_processor(),
        *gpus(probes.get("torch"), shutil.which("nvidia-smi")),
        *storage(home),
        *_hub(),
        *_trackers(),
    ]


def doctor_table(findings: Sequence[Finding]) -> Table:
    """One row per finding."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "what", "found", "which means"):
        table.add_column(name, overflow="fold")
    for each in findings:
        table.add_row(Text(each.state, STYLES[each.state]), each.what, Text(each.found), Text(each.meaning))
    return table


# Software --------------------------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    if sys.version_info < OLDEST_PYTHON:
        yield Finding("python", "broken", platform.python_version(), "install Python 3.11 or later")
    else:
        yield Finding("python", "ok", platform.python_version(), sys.executable)


def packages(lines: Sequence[str]) -> Iterator[Finding]:
    """Whether every package that align declares is there and new enough.

    Args:
        lines: Requirements as the package metadata has them: ``torch>=2.11``, ``trl>=1.16; extra == 'trl'``.
    """
    for line in lines:
        wanted = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*(?:>=\s*([\d.]+))?", line)
        extra = re.search(r"extra == [\"'](\w+)[\"']", line)
        if wanted is None or wanted[1] == "align" or (extra and extra[1] in ("dev", "all")):
            continue
        name, least = wanted[1], wanted[2] or "0"
        missing: State = "note" if extra else "broken"
        install = f"pip install 'align[{extra[1]}]'" if extra else f"pip install '{name}>={least}'"
        try:
            have = version(name)
        except PackageNotFoundError:
            yield Finding(name, missing, "not installed", install)
            continue
        if _numbers(have) < _numbers(least):
            yield Finding(name, missing, f"{have}, older than {least}", install)
        else:
            yield Finding(name, "ok", have)


def _numbers(text: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0]))


def run_probes(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Try libraries in processes of their own, all at once.

    Returns:
        Name -> what its probe found, or `error` with the reason.
    """
    argv = [sys.executable, "-m", "align.stages.probe"]
    pipe = subprocess.PIPE
    running = {
        name: subprocess.Popen(
            [*argv, name], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=environment(os.environ)
        )
        for name in names
    }
    return {name: _answer(process) for name, process in running.items()}


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"no answer in {PROBE_SECONDS} s"}
    if process.returncode:
        return {"error": (err.strip().splitlines() or [f"ended with {process.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def libraries(probes: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """What the probes say about libraries that have to work, not only to be there."""
    for name in [name for name in probes if "error" in probes[name]]:
        state: State = "broken" if name in REQUIRED_PROBES else "note"
        yield Finding(
            f"import {name}", state, str(probes[name]["error"]), f"reinstall it: pip install --force-reinstall {name}"
        )
    if "devices" in probes.get("bitsandbytes", {}):
        devices = " and ".join(probes["bitsandbytes"]["devices"])
        yield Finding("NF4 layer", "ok", f"forward and backward are right on {devices}")
    if "error" in probes.get("deepspeed", {"error": ""}):
        yield Finding(
            "ZeRO", "note", "DeepSpeed is missing or broken", "launch.deepspeed has to be none; launch.processes works"
        )
    else:
        yield Finding("ZeRO", "ok", "DeepSpeed can be imported", "no compiler is needed")


def method_plugins(probe: dict[str, Any]) -> Iterator[Finding]:
    """Methods of other packages; one that cannot be loaded stops every command.

    Args:
        probe: What the probe `methods` found.
    """
    uninstall = "uninstall the package that registers it"
    if "error" in probe:
        yield Finding("method plug-ins", "broken", probe["error"], uninstall)
    for name, plugin in probe.get("plugins", {}).items():
        if "error" in plugin:
            yield Finding(f"method plug-in {name}", "broken", plugin["error"], plugin["fix"] or uninstall)
        else:
            yield Finding(f"method plug-in {name}", "ok", ", ".join(plugin["kinds"]), f"from {plugin['value']}")


# Hardware --------------------------------------------------------------------------------------------------------


def _processor() -> Iterator[Finding]:
    found = hardware()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else found["cores"]
    flags = _cpu_flags()
    special = (
        ", ".join(name for flag, name in CPU_FLAGS.items() if flag in flags) or "no vector extension that is known"
    )
    yield Finding("processor", "ok", f"{found['processor']}, {usable} of {found['cores']} cores, {special}")
    if "avx512_bf16" in flags:
        yield Finding(
            "AVX512-BF16",
            "ok",
            "bitsandbytes would repack 4-bit weights in place here",
            "align switches that off: training after it has wrong gradients",
        )
    yield Finding("memory", "ok", _gib(found["memory_bytes"]))


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    flags = re.search(r"^flags\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return set(flags[1].split()) if flags else set()


def gpus(torch: dict[str, Any] | None, nvidia_smi: str | None) -> Iterator[Finding]:
    """GPUs that torch can use, and those it cannot.

    Args:
        torch: What its probe found.
        nvidia_smi: Path of the driver's tool, if there is one.
    """
    if torch is None or "error" in torch:
        return
    usable = torch["gpus"]
    for gpu in usable:
        yield Finding("GPU", "ok", f"{gpu['name']}, {_gib(gpu['memory_bytes'])}, compute capability {gpu['sm'] / 10}")
    if usable:
        yield Finding(
            "CUDA",
            "note",
            f"torch for CUDA {torch['built_for_cuda']}",
            "not yet run on CUDA: the paths for GPUs (NCCL, bf16, NF4 kernels, the ragged attention kernel of shared "
            "prompts, CUDA graphs and vLLM for drawing) are written and were never tried; `train.packing: rows` avoids "
            "the kernel",
        )
        if not torch["bf16"]:
            yield Finding("bf16", "note", "the GPU has none", "dtype auto is float32")
    elif nvidia_smi is not None:
        reason = "torch is built without CUDA" if torch["built_for_cuda"] is None else "torch cannot use it"
        yield Finding("GPU", "note", reason, "there is an NVIDIA driver: install torch for CUDA to use the GPU")
    else:
        yield Finding("GPU", "note", "none", "everything runs on the CPU in float32: for small models")


# Storage and surroundings ----------------------------------------------------------------------------------------


def storage(home: Path) -> Iterator[Finding]:
    """Whether the store can be written, safely and enough."""
    place = next(path for path in (home, *home.parents) if path.exists())
    try:
        with TemporaryDirectory(dir=place, prefix=".align-doctor-") as folder:
            write_atomic(Path(folder) / "file", "text")
            with locked(Path(folder) / "lock", "align doctor"):
                holds = is_locked(Path(folder) / "lock")
    except (OSError, AlignError) as error:
        yield Finding("store", "broken", f"{home}: {error}", "set ALIGN_HOME to a folder on a disk you can write to")
        return
    if not holds:
        yield Finding(
            "store", "broken", f"{home}: its file system ignores locks", "set ALIGN_HOME to a folder on a local disk"
        )
        return
    free = shutil.disk_usage(place).free
    state: State = "ok" if free >= LITTLE_DISK else "note"
    yield Finding(
        "store", state, f"{home}, {_gib(free)} free", "" if state == "ok" else "`align gc`, or set ALIGN_HOME"
    )


def _hub() -> Iterator[Finding]:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("Hub", "note", "HF_HUB_OFFLINE is set", "Hub names work only where they were downloaded before")


def _trackers() -> Iterator[Finding]:
    for name in ("wandb", "tensorboard"):
        if importlib.util.find_spec(name) is None:
            yield Finding(name, "note", "not installed", f"logging.report_to cannot name it; pip install {name}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
