"""Starts the process that runs one stage, hands signals on to it, and tells how it ended."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from pydantic import ValidationError

from align.artifacts.lock import locked
from align.artifacts.seal import write_atomic
from align.errors import EXIT_PREEMPTED, AlignError, DataError, LaunchError, RecipeError, TrainingError
from align.spec.job import Job, Status

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LOG_LINES = 20
WORKER_LOCK = "worker.lock"
STOP_SECONDS = 60.0
PATIENCE_SECONDS = 1.0
"""Service managers send several signals at once; a person who wants an end now comes later."""
RESUME = "run the same command again to resume"
RESTART = "run the same command again; the stage starts from its beginning, for engine: trl keeps no checkpoints"


class Preempted(AlignError):
    """A signal stopped the stage after it saved a checkpoint."""

    exit_code = EXIT_PREEMPTED


class Interrupted(AlignError):
    """SIGINT stopped the stage before it could save a checkpoint."""

    exit_code = 128 + signal.SIGINT


class Terminated(AlignError):
    """SIGTERM (or SIGHUP, SIGUSR1) stopped the stage before it could save a checkpoint."""

    exit_code = 128 + signal.SIGTERM


_ERROR_OF_CODE = {kind.exit_code: kind for kind in (TrainingError, RecipeError, DataError, LaunchError)}


def command(job: Job, job_path: Path) -> list[str]:
    """The argv of a stage: plain python for one process, torchrun on this machine for several or for DeepSpeed.

    Raises:
        LaunchError: DeepSpeed is asked for and not installed.
    """
    worker = ["-m", "align.stages.worker", str(job_path)]
    launch = job.launch
    if launch.deepspeed != "none" and importlib.util.find_spec("deepspeed") is None:
        raise LaunchError(
            f"launch.deepspeed is {launch.deepspeed!r} and the package deepspeed is not installed",
            where=f"stage {job.stage}",
            fix="pip install 'align[deepspeed]', or set launch.deepspeed: none",
        )
    if launch.processes == 1 and launch.deepspeed == "none":
        return [sys.executable, *worker]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={launch.processes}"]
    return [sys.executable, *torchrun, *worker]


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """The variables of a worker: the runner's own, with a live log.

    PYTHONSAFEPATH keeps the current folder off the import path: a user's `datasets.py` must not become the library.
    """
    return {**base, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}


def read_status(work: Path) -> Status | None:
    """The worker's answer so far; None before its first word."""
    try:
        return Status.model_validate_json((work / "status.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


class Worker:
    """The process of one stage, in a process group of its own so that Ctrl-C reaches it once, through the runner.

    It inherits a lock file, so that a worker whose runner was killed is seen and not doubled.

    Args:
        job: What to run; written to `job.json` in its work folder when the worker is entered (`with`), which starts the
            process. Output is appended to `log.txt` there.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.work = Path(job.work)
        self.log = self.work / "log.txt"
        self.received: signal.Signals | None = None
        self._asked = 0.0
        self._argv = command(job, self.work / "job.json")
        self._torchrun = "torch.distributed.run" in self._argv
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        """Start it.

        Raises:
            LaunchError: A worker of this stage is still alive.
        """
        with self._alone() as held:
            (self.work / "status.json").unlink(missing_ok=True)
            write_atomic(self.work / "job.json", self.job.model_dump_json(indent=2))
            with self.log.open("ab") as log:
                self._process = _start(self._argv, log, held)
        if self.received is not None:
            self._ask(self.received)
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:  # the runner failed: leave no worker behind
            self._ask(signal.SIGTERM)
            if not self.wait(STOP_SECONDS):
                self.process.kill()

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Take the lock that the worker is to inherit."""
        try:
            with locked(self.work / WORKER_LOCK, f"stage {self.job.stage}") as descriptor:
                yield descriptor
        except LaunchError:
            status = self.status
            pid = status.pid if status else "unknown"
            raise LaunchError(
                f"a worker of this stage is still running (pid {pid}); its runner was killed",
                where=f"stage {self.job.stage}",
                fix=f"wait until it is done, or stop it (kill {pid}); then run the same command again",
            ) from None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "enter the worker first"
        return self._process

    @property
    def status(self) -> Status | None:
        return read_status(self.work)

    def wait(self, seconds: float) -> bool:
        """Wait for the end, at most that long; whether it came."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def forward(self, number: int) -> None:
        """Hand a signal on: the worker saves and stops. One that comes later than the others ends it at once."""
        now = time.monotonic()
        if self.received is None:
            self.received, self._asked = signal.Signals(number), now
            if self._process is not None:  # else it is asked as soon as it starts
                self._ask(self.received)
        elif self._process is not None and now - self._asked > PATIENCE_SECONDS:
            self._process.send_signal(signal.SIGTERM if self._torchrun else signal.SIGKILL)

    def _ask(self, wish: signal.Signals) -> None:
        """Ask for a stop at the next step.

        torchrun would give its ranks 30 seconds and then kill them, so rank 0 is asked (its pid is in the status file),
        which agrees with the others on a step.
        """
        wish = signal.SIGTERM if wish == signal.SIGHUP else wish
        status = self.status
        if status is None or not status.pid:
            self.process.send_signal(wish)
            return
        with suppress(ProcessLookupError):  # it ended by itself in between
            os.kill(status.pid, wish)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While this is open, signals to the runner go to the worker. Outside the main thread Python cannot do that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handler(number: int, frame: FrameType | None) -> None:
            self.forward(number)

        # Under nohup SIGHUP is ignored, and is meant to be.
        numbers = [n for n in FORWARDED if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, handler) for number in numbers}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def check(self, log: Path) -> None:
        """Raise what ended the worker, unless it is done.

        Args:
            log: Where the user finds the log.

        Raises:
            AlignError: Of the class whose exit code the worker ended with.
        """
        again = again_of(self.job)
        error = failure(self.job.stage, self.status, self.process.returncode, self.received, log, again)
        if error is not None:
            raise error


def again_of(job: Job) -> str:
    """What the same command does when a worker of this job was stopped."""
    return RESTART if job.settings.get("engine") == "trl" else RESUME


def failure(
    stage: str, status: Status | None, code: int, received: signal.Signals | None, log: Path, again: str = RESUME
) -> AlignError | None:
    """What ended a worker, as the error to tell; None if it is done.

    The status file counts before the return code: launchers turn every failure into 1, and a library may spoil a good
    code on its way out (the artifact is verified next).

    Args:
        stage: The stage's name.
        status: The worker's last word.
        code: Its return code, negative for a signal.
        received: The signal that was handed on to it.
        log: Its log, where the user finds it.
        again: What happens when the same command is run again.
    """
    where = f"stage {stage}"
    if status is not None and status.state == "done":
        return None
    if status is not None and status.state == "preempted":
        return Preempted(status.message, where=where, fix=RESUME)
    if received is not None:
        kind = Interrupted if received == signal.SIGINT else Terminated
        saved = " before it could save" if again == RESUME else ""
        return kind(f"stopped by {received.name}{saved}", where=where, fix=again)
    if status is not None and status.state == "failed":
        return error_class(status.exit_code or 1)(f"{status.message}\n  log: {log}", where=where)
    return TrainingError(
        f"the worker {ending(code)} without a word; the end of its log ({log}):\n{tail(log)}", where=where, fix=again
    )


def error_class(code: int) -> type[AlignError]:
    """The kind of error that ends a process with this code."""
    return _ERROR_OF_CODE.get(code, TrainingError)


def _start(argv: list[str], log: BinaryIO, held: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment(os.environ),
        process_group=0,
        pass_fds=(held,),
    )


def ending(code: int) -> str:
    """How a process ended, in words, from its return code."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (often: out of memory)" if name == "SIGKILL" else "")


def tail(log: Path, lines: int = LOG_LINES) -> str:
    """The last lines of a log, indented."""
    with log.open(encoding="utf-8", errors="replace") as file:
        return "".join(f"  | {line.rstrip()}\n" for line in deque(file, maxlen=lines)).rstrip("\n") or "  | (empty)"
