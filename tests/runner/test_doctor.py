from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from align.runner.doctor import Finding, doctor_table, gpus, libraries, packages, run_probes, storage
from tests.artifacts.processes import small_disk


def states(findings: list[Finding]) -> dict[str, str]:
    return {each.what: each.state for each in findings}


def shown(findings: list[Finding]) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(doctor_table(findings))
    return out.getvalue()


# --- packages ----------------------------------------------------------------------------------------------------


def test_packages_are_held_against_what_the_project_declares() -> None:
    found = list(
        packages(
            [
                "pydantic>=2.0",
                "rich>=999.1",
                "surely-not-installed>=1",
                "also-not-installed>=1 ; extra == 'deepspeed'",
                "typer>=999 ; extra == 'trl'",
                "ruff>=999 ; extra == 'dev'",
                "align[deepspeed,trl] ; extra == 'all'",
                "pyyaml",
            ]
        )
    )
    assert states(found) == {
        "pydantic": "ok",
        "rich": "broken",
        "surely-not-installed": "broken",
        "also-not-installed": "note",
        "typer": "note",
        "pyyaml": "ok",
    }
    assert found[1].meaning == "pip install 'rich>=999.1'"
    assert found[3].meaning == "pip install 'align[deepspeed]'"


def test_the_development_environment_is_sound() -> None:
    from importlib.metadata import requires

    found = list(packages(requires("align") or []))
    assert {"torch", "transformers", "peft", "bitsandbytes", "datasets"} <= set(states(found))
    assert [each for each in found if each.state == "broken"] == []


# --- probes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probes() -> dict[str, dict[str, Any]]:
    return run_probes(["torch", "no-such-probe"])


def test_probes_answer_from_their_own_processes(probes: dict[str, dict[str, Any]]) -> None:
    import torch

    assert probes["torch"]["built_for_cuda"] == torch.version.cuda
    assert len(probes["torch"]["gpus"]) == torch.cuda.device_count()
    assert "KeyError" in probes["no-such-probe"]["error"]


def test_what_a_probe_says_decides() -> None:
    good: dict[str, dict[str, Any]] = {"bitsandbytes": {"devices": ["cpu"]}, "peft": {}, "deepspeed": {}}
    assert states(list(libraries(good))) == {"NF4 layer": "ok", "ZeRO": "ok"}
    bad = {"bitsandbytes": {"error": "RuntimeError: the gradient is off"}, "deepspeed": {"error": "no compiler"}}
    found = list(libraries(bad))
    assert states(found) == {"import bitsandbytes": "broken", "import deepspeed": "note", "ZeRO": "note"}
    assert found[0].found == "RuntimeError: the gradient is off"
    assert "deepspeed has to be none" in found[2].meaning
    assert states(list(libraries({}))) == {"ZeRO": "note"}


def test_the_nf4_probe_sees_the_repack_that_ruins_gradients() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512_bf16" not in flags:
        pytest.skip("this processor has no AVX512-BF16, so bitsandbytes repacks nothing")
    code = (
        "import align.models.platform as platform; platform.prepare_bitsandbytes = lambda: None\n"
        "from align.stages.probe import PROBES; PROBES['bitsandbytes']()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "of an NF4 layer on cpu is off by" in done.stderr or "does not require grad" in done.stderr


# --- hardware ----------------------------------------------------------------------------------------------------

H200 = {"name": "NVIDIA H200", "memory_bytes": 150 * 2**30, "sm": 90}


SMI = "/usr/bin/nvidia-smi"


def probe(cuda: str | None, *gpus: dict[str, Any], bf16: bool = False) -> dict[str, Any]:
    return {"built_for_cuda": cuda, "gpus": list(gpus), "bf16": bf16}


@pytest.mark.parametrize(
    ("torch", "driver", "expected", "text"),
    [
        (probe("13.0", H200, H200, bf16=True), SMI, ["ok", "ok", "note"], "not yet run on CUDA"),
        (probe("12.8", H200), None, ["ok", "note", "note"], "dtype auto is float32"),
        (probe(None), SMI, ["note"], "built without CUDA"),
        (probe("13.0"), SMI, ["note"], "torch cannot use it"),
        (probe(None), None, ["note"], "everything runs on the CPU"),
        ({"error": "ImportError: libtorch"}, None, [], ""),
        (None, None, [], ""),
    ],
)
def test_gpus(torch: dict[str, Any] | None, driver: str | None, expected: list[str], text: str) -> None:
    found = list(gpus(torch, driver))
    assert [each.state for each in found] == expected
    assert text in shown(found)


# --- storage -----------------------------------------------------------------------------------------------------


def test_a_store_is_tried_without_leaving_a_trace(tmp_path: Path) -> None:
    home = tmp_path / "not" / "there" / "yet"
    (found,) = storage(home)
    assert found.state in ("ok", "note")
    assert f"{home}, " in found.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["file", "file/inside", "proc"])
def test_a_store_that_cannot_be_written_is_broken(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    (found,) = storage(Path("/proc/align") if where == "proc" else tmp_path / where)
    assert found.state == "broken"
    assert "ALIGN_HOME" in found.meaning


def test_little_disk_is_noted_and_none_is_broken(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        (found,) = storage(disk)
        assert (found.state, found.meaning) == ("note", "`align gc`, or set ALIGN_HOME")
        with (disk / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096) == 4096:
                if os.statvfs(disk).f_bavail == 0:
                    break
        (found,) = storage(disk)
        assert found.state == "broken"


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.e2e
def test_a_broken_machine_is_told_whole_and_ends_with_code_4() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "align", "doctor"],
        env=os.environ | {"ALIGN_HOME": "/proc/align"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "this machine cannot run align: store: /proc/align" in done.stderr
    assert "fix: set ALIGN_HOME" in done.stderr
    for line in ("python", "torch", "NF4 layer", "ZeRO", "processor", "GPU", "broken", "store", "HF_HUB_OFFLINE"):
        assert line in done.stdout
