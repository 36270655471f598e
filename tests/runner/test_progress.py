from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from align.runner import progress
from align.runner.progress import MetricsTail, StageProgress, clock
from align.spec.job import Status


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_metrics_before_the_first_line(metrics: Path) -> None:
    assert MetricsTail(metrics).read() == {}


def test_metrics_keep_the_latest_of_each(metrics: Path) -> None:
    tail = MetricsTail(metrics)
    metrics.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "eval_loss": 2.5}\n')
    assert tail.read() == {"step": 2, "loss": 3.0, "eval_loss": 2.5}


def test_a_line_being_written_waits_for_its_end(metrics: Path) -> None:
    tail = MetricsTail(metrics)
    metrics.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert tail.read() == {"step": 1, "loss": 3.0}
    with metrics.open("a") as file:
        file.write('ss": 2.0}\n')
    assert tail.read() == {"step": 2, "loss": 2.0}


def test_a_file_cut_back_by_a_resumed_worker_is_read_again(metrics: Path) -> None:
    tail = MetricsTail(metrics)
    metrics.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "grad_norm": 9.0}\n')
    tail.read()
    metrics.write_text('{"step": 1, "loss": 3.0}\n')
    assert tail.read() == {"step": 1, "loss": 3.0}


def test_a_line_that_a_kill_cut_short_is_passed_over(metrics: Path) -> None:
    metrics.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo{"step": 2, "loss": 2.5}\n{"step": 3, "loss": 2.0}\n')
    assert MetricsTail(metrics).read() == {"step": 3, "loss": 2.0}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (7, "0:07"), (59.7, "1:00"), (750, "12:30"), (10921, "3:02:01")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def shown(
    width: int, statuses: list[tuple[float, Status]], monkeypatch: pytest.MonkeyPatch, terminal: bool = False
) -> str:
    """What a stage's progress writes, given statuses at these seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, no_color=True, get_time=lambda: now[0])
    with StageProgress(console, "sft") as bar:
        for now[0], status in statuses:
            bar.update(status, {"loss": 1.23456} if status.step else {})
    return out.getvalue()


RUNNING = [(float(t), Status(state="running", step=100 + 2 * t, total_steps=400)) for t in range(1, 101)]


def test_a_pipe_gets_a_plain_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(40, RUNNING, monkeypatch).splitlines()
    assert len(lines) == 10
    assert lines[4] == "  sft  200/400  loss 1.235  2.0 it/s  ETA 1:40"


def test_steps_before_a_resume_do_not_count_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [(float(t), Status(state="running", step=300 + t // 5, total_steps=400)) for t in range(1, 31)]
    last = shown(80, slow, monkeypatch).splitlines()[-1]
    assert "5.0 s/it" in last
    assert "ETA 7:50" in last


def test_before_the_first_step_the_phase_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = [(float(t), Status(state="running", message="reading data")) for t in range(1, 12)]
    assert shown(80, waiting, monkeypatch) == "  sft  reading data\n"


def test_a_line_that_says_nothing_new_comes_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [(float(t), Status(state="running", step=7, total_steps=9)) for t in range(1, 135)]
    assert shown(80, slow, monkeypatch) == "  sft  7/9  loss 1.235\n" * 3


@pytest.mark.parametrize("width", [30, 60, 100])
def test_a_terminal_of_any_width_gets_a_bar_that_fits(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    text = shown(width, RUNNING, monkeypatch, terminal=True)
    rows = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    assert any("sft" in row and "300/400" in row for row in rows)
    assert max(map(cell_len, rows)) <= width


def test_what_is_told_is_told_once() -> None:
    console = Console(file=io.StringIO(), width=80)
    with StageProgress(console, "sft") as bar:
        bar.tell("SIGINT: saving and stopping")
        bar.tell("SIGINT: saving and stopping")
    assert console.file.getvalue() == "  SIGINT: saving and stopping\n"
