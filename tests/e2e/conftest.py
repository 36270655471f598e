"""Runs the real command line in a home and a folder of its own."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TINY = Path(__file__).with_name("tiny.yaml")


@dataclass
class Cli:
    """`align` as a user starts it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def start(self, *arguments: str) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"ALIGN_HOME": str(self.home), "COLUMNS": "160"} | self.environment
        return subprocess.Popen(
            [sys.executable, "-m", "align.cli", *arguments],
            cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def __call__(self, *arguments: str, code: int = 0, timeout: float = 280) -> str:
        process = self.start(*arguments)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"align {' '.join(arguments)} took over {timeout} s:\n{output}") from None
        assert process.returncode == code, output
        return output

    def run(self, *arguments: str, code: int = 0, recipe: Path = TINY) -> str:
        return self("run", str(recipe), *arguments, code=code)

    def stage(self, name: str, recipe: str = "tiny") -> Path:
        return self.folder / "runs" / recipe / name

    def weights(self, name: str, recipe: str = "tiny") -> str:
        """sha256 over the weight files of a stage."""
        digest = hashlib.sha256()
        files = sorted(self.stage(name, recipe).resolve().rglob("*.safetensors"))
        assert files
        for file in files:
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

    def manifest(self, name: str) -> dict:
        return json.loads((self.stage(name) / "manifest.json").read_text())

    def kill_after_checkpoint(self, step: int, *arguments: str) -> None:
        """Start a run and kill every process of it with SIGKILL as soon as a checkpoint of that step is published."""
        process = self.start("run", str(TINY), *arguments)
        deadline = time.monotonic() + 200
        try:
            while time.monotonic() < deadline:
                if list((self.home / "work").glob(f"*/checkpoints/step-{step:06d}")):
                    return
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.005)
            raise AssertionError("no checkpoint appeared")
        finally:
            self._kill_all(process)

    def _kill_all(self, process: subprocess.Popen) -> None:
        for status in self.home.glob("work/*/status.json"):
            pid = json.loads(status.read_text()).get("pid")
            if pid and status.stat().st_mtime > time.time() - 200:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Cli:
    """One undisturbed run of the whole tiny recipe, shared by the tests that look at its results."""
    cli = Cli(tmp_path_factory.mktemp("tiny"))
    cli.output = cli.run()
    return cli
