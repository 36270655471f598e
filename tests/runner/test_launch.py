from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from align.artifacts.lock import locked
from align.errors import AlignError, DataError, LaunchError, RecipeError, TrainingError
from align.runner.launch import (
    Interrupted,
    Preempted,
    Terminated,
    Worker,
    again_of,
    command,
    ending,
    environment,
    failure,
    tail,
)
from align.spec.job import Job, Status
from align.spec.train import LaunchSettings


def job(work: Path, **changes) -> Job:
    content = {
        "recipe": "r",
        "stage": "sft",
        "kind": "sft",
        "settings": {"kind": "sft", "data": "rows"},
        "fingerprint": "f" * 64,
        "folder": str(work),
        "work": str(work),
        "home": str(work / "home"),
    }
    return Job.model_validate(content | changes)


def test_one_process_is_plain_python(tmp_path: Path) -> None:
    argv = command(job(tmp_path), tmp_path / "job.json")
    assert argv == [sys.executable, "-m", "align.stages.worker", str(tmp_path / "job.json")]


@pytest.mark.parametrize(("processes", "deepspeed"), [(2, "none"), (2, "zero2"), (1, "zero3")])
def test_several_processes_or_deepspeed_go_through_torchrun(
    tmp_path: Path, processes: int, deepspeed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    launch = LaunchSettings(processes=processes, deepspeed=deepspeed)
    argv = command(job(tmp_path, launch=launch), tmp_path / "job.json")
    assert argv[:4] == [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    assert argv[4:] == [f"--nproc_per_node={processes}", "-m", "align.stages.worker", str(tmp_path / "job.json")]


def test_deepspeed_has_to_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"stage sft: launch.deepspeed is 'zero2'[^\n]*\n  fix: pip install"):
        command(job(tmp_path, launch=LaunchSettings(deepspeed="zero2")), tmp_path / "job.json")


def test_environment_keeps_what_the_user_set() -> None:
    given = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_TOKEN": "secret", "PATH": "/bin"}
    assert environment(given).items() >= given.items()


def test_a_file_of_the_current_folder_is_not_taken_for_a_library(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise SystemExit('the wrong yaml')")
    argv = [sys.executable, "-c", "import yaml; print(yaml.__file__)"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in done.stdout


STATUS = {"state": "failed", "message": "rows.jsonl:3: bad", "exit_code": 3}


@pytest.mark.parametrize(
    ("status", "code", "received", "expected", "exit_code"),
    [
        pytest.param({"state": "failed", "message": "m", "exit_code": 2}, 2, None, RecipeError, 2, id="recipe"),
        pytest.param(STATUS, 3, None, DataError, 3, id="data"),
        pytest.param(STATUS, 1, None, DataError, 3, id="launchers turn every failure into 1"),
        pytest.param({"state": "failed", "message": "m", "exit_code": 4}, 4, None, LaunchError, 4, id="environment"),
        pytest.param({"state": "failed", "message": "m"}, 1, None, TrainingError, 1, id="no code"),
        pytest.param({"state": "preempted", "exit_code": 75}, 1, None, Preempted, 75, id="preempted by somebody"),
        pytest.param({"state": "preempted", "exit_code": 75}, 75, signal.SIGINT, Preempted, 75, id="preempted"),
        pytest.param({"state": "failed", "exit_code": 1}, 1, signal.SIGINT, Interrupted, 130, id="interrupted early"),
        pytest.param(None, -15, signal.SIGTERM, Terminated, 143, id="terminated before its first word"),
        pytest.param({"state": "running"}, -9, None, TrainingError, 1, id="killed"),
        pytest.param(None, 1, None, TrainingError, 1, id="never spoke"),
    ],
)
def test_how_a_worker_ended(
    tmp_path: Path,
    status: dict | None,
    code: int,
    received: signal.Signals | None,
    expected: type[AlignError],
    exit_code: int,
) -> None:
    log = tmp_path / "sft.txt"
    log.write_text("first\nlast words\n")
    error = failure("sft", Status(**status) if status else None, code, received, log)
    assert type(error) is expected
    assert error.exit_code == exit_code
    assert error.where == "stage sft"
    if status is not None and status["state"] == "failed" and received is None:
        assert error.message == f"{status['message']}\n  log: {log}"
    else:
        assert error.fix == "run the same command again to resume"


@pytest.mark.parametrize("engine", ["align", "trl"])
def test_a_stage_that_keeps_no_checkpoints_is_not_said_to_resume(tmp_path: Path, engine: str) -> None:
    (tmp_path / "log").touch()
    again = again_of(job(tmp_path, settings={"kind": "sft", "data": "rows", "engine": engine}))
    stopped = failure("sft", Status(state="failed", exit_code=1), 1, signal.SIGINT, tmp_path / "log", again)
    killed = failure("sft", None, -9, None, tmp_path / "log", again)
    for error in (stopped, killed):
        assert error is not None
        assert error.fix is not None
        assert error.fix.startswith("run the same command again")
        assert ("to resume" in error.fix) == (engine == "align")
        assert ("starts from its beginning" in error.fix) == (engine == "trl")
    assert stopped is not None
    assert ("before it could save" in stopped.message) == (engine == "align")


def test_a_silent_death_shows_the_end_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "sft.txt"
    log.write_text("".join(f"line {i}\n" for i in range(30)))
    error = failure("sft", Status(state="running", step=7), -signal.SIGKILL, None, log)
    assert error is not None
    assert error.message.startswith("the worker was killed by SIGKILL (often: out of memory) without a word; ")
    assert str(log) in error.message
    assert error.message.endswith("line 29")
    assert "line 10\n" in error.message
    assert "line 9\n" not in error.message


def test_done_is_done_whatever_the_return_code(tmp_path: Path) -> None:
    assert failure("sft", Status(state="done", exit_code=0), -11, None, tmp_path / "log") is None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "ended with exit code 0"),
        (-15, "was killed by SIGTERM"),
        (-9, "was killed by SIGKILL (often: out of memory)"),
    ],
)
def test_ending(code: int, words: str) -> None:
    assert ending(code) == words


def test_tail_of_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    assert tail(tmp_path / "log") == "  | (empty)"


def test_a_worker_stops_when_asked_and_holds_its_lock_until_then(tmp_path: Path) -> None:
    with Worker(job(tmp_path)) as worker:
        with pytest.raises(LaunchError, match=r"a worker of this stage is still running .*; its runner was killed"):
            Worker(job(tmp_path)).__enter__()
        worker.forward(signal.SIGTERM)
        assert worker.wait(60)
    with pytest.raises(Terminated):
        worker.check(worker.log)
    with locked(tmp_path / "worker.lock", "the test"):
        pass


def test_a_worker_that_does_not_stop_is_ended_by_a_later_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several at once are one wish; a stopped process (SIGSTOP) hears none but SIGKILL."""
    now = [100.0]
    monkeypatch.setattr("align.runner.launch.time.monotonic", lambda: now[0])
    with Worker(job(tmp_path)) as worker:
        worker.process.send_signal(signal.SIGSTOP)
        worker.forward(signal.SIGTERM)
        worker.forward(signal.SIGHUP)
        assert worker.process.poll() is None
        now[0] += 2
        worker.forward(signal.SIGTERM)
        assert os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT).si_status == signal.SIGKILL
    assert worker.process.poll() == -signal.SIGKILL
    with pytest.raises(Terminated):
        worker.check(worker.log)


def test_a_signal_before_the_start_reaches_the_worker(tmp_path: Path) -> None:
    worker = Worker(job(tmp_path))
    with worker.signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with worker:
            assert worker.wait(60)
    assert worker.received == signal.SIGTERM
    with pytest.raises(Terminated):
        worker.check(worker.log)


def test_signal_handlers_are_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Worker(job(tmp_path)).signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_nohup_is_respected(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Worker(job(tmp_path)).signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_no_worker_outlives_a_runner_that_fails(tmp_path: Path) -> None:
    worker = Worker(job(tmp_path))
    with pytest.raises(ZeroDivisionError), worker:
        raise ZeroDivisionError
    assert worker.process.poll() is not None
