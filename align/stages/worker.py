"""Entry point of a worker process: `python -m align.stages.worker JOB.json`, or the same under torchrun.

A worker runs one stage and answers with `status.json`: launchers turn every failure into exit code 1, so the real
code travels in the file. Rank 0 speaks for all.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from importlib import import_module
from pathlib import Path

from align.artifacts.seal import write_atomic
from align.errors import EXIT_DONE, EXIT_PREEMPTED, AlignError
from align.spec.job import Job, Status
from align.spec.kinds import OTHER_KINDS

STATUS_EVERY_SECONDS = 0.5


class Reporter:
    """Writes `status.json`, at most twice a second, from rank 0."""

    def __init__(self, work: Path) -> None:
        self.path = work / "status.json"
        self.speaks = os.environ.get("RANK", "0") == "0"
        self.resumed_from_step = 0
        self._last = (0, 0)
        self._warnings: list[str] = []
        self._written = 0.0

    def __call__(self, step: int, total: int, message: str) -> None:
        self._last = (step, total)
        if time.monotonic() - self._written >= STATUS_EVERY_SECONDS or step == total:
            self.write("running", message)

    def warn(self, message: str) -> None:
        """Have a user told, once, while the stage goes on."""
        if message not in self._warnings:
            self._warnings.append(message)
            self.write("running")

    def write(self, state: str, message: str = "", exit_code: int | None = None) -> None:
        if not self.speaks:
            return
        self._written = time.monotonic()
        step, total = self._last
        status = Status(
            state=state,  # type: ignore[arg-type]
            step=step,
            total_steps=total,
            resumed_from_step=self.resumed_from_step,
            message=message,
            warnings=self._warnings,
            exit_code=exit_code,
            pid=os.getpid(),
        )
        write_atomic(self.path, status.model_dump_json())


def run(job: Job, report: Reporter) -> int:
    """Run one job in this process; the exit code."""
    from align.artifacts.store import Store
    from align.models.platform import prepare_process
    from align.recipe.schema import stage_kinds
    from align.training.guards import Preempted

    prepare_process()
    store = Store(Path(job.home))
    settings = stage_kinds()[job.kind].model_validate(job.settings)
    for name in job.data.keys() & job.inputs.keys():
        store.get(job.inputs[name])  # records of a stage are read as files are: they are verified here
    try:
        module = import_module(f"align.stages.{job.kind if job.kind in OTHER_KINDS else 'train'}")
        module.run(job, settings, store, report)
    except Preempted as stop:
        kept = f" after step {stop}; a checkpoint is kept" if stop.args else "; what is finished is kept"
        report.write("preempted", f"stopped by a signal{kept}", EXIT_PREEMPTED)
        return EXIT_PREEMPTED
    report.write("done", exit_code=EXIT_DONE)
    return EXIT_DONE


def main(path: str) -> int:
    """Read the job, run it, and tell a user's error without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    job = Job.model_validate_json(Path(path).read_text())
    report = Reporter(Path(job.work))
    report.write("starting")
    try:
        return run(job, report)
    except AlignError as error:
        report.write("failed", str(error), error.exit_code)
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except BaseException as error:
        report.write("failed", f"{type(error).__name__}: {error}", 1)
        raise


if __name__ == "__main__":
    code = main(sys.argv[1])
    gc.freeze()  # or the collector goes through all that was imported once more before the process ends: 1.4 s
    sys.exit(code)
