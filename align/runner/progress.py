"""Shows how far a stage is: a live bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn

from align.spec.job import Status

LINE_EVERY_SECONDS = 10.0
SAME_LINE_EVERY_SECONDS = 60.0
NARROW = 70


class MetricsTail:
    """Reads the lines that were added to a `metrics.jsonl` since the last call.

    A resumed worker may have cut the file back to its checkpoint; it is then read from the start again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.latest: dict[str, Any] = {}
        self._offset = 0

    def read(self) -> dict[str, Any]:
        """The latest value of every metric so far."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset, self.latest = 0, {}
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return self.latest
        whole = new[: new.rfind(b"\n") + 1]  # the rest is a line that is still being written
        self._offset += len(whole)
        for line in whole.splitlines():
            with suppress(json.JSONDecodeError):  # a line that a kill cut short
                self.latest |= json.loads(line)
        return self.latest


class StageProgress:
    """The progress of one stage, fed with what its worker wrote.

    Args:
        console: Where to show it.
        label: What to call it: the stage's name, padded.
    """

    def __init__(self, console: Console, label: str) -> None:
        self._console = console
        self._progress = Progress(*_columns(console.width), console=console, transient=True, refresh_per_second=4)
        self._task = self._progress.add_task(label, total=None, detail="starting")
        self._printed, self._line = time.monotonic(), ""
        self._first = True
        self._told: set[str] = set()

    def __enter__(self) -> StageProgress:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def update(self, status: Status | None, metrics: dict[str, Any]) -> None:
        """Show a status and the latest metrics."""
        if status is None:
            return
        if self._first and status.step:
            # Steps of an earlier attempt took none of this one's time.
            self._progress.reset(self._task, completed=status.step)
            self._first = False
        self._progress.update(
            self._task, completed=status.step, total=status.total_steps or None, detail=_detail(status, metrics)
        )
        for warning in status.warnings:
            self.tell(f"warning: {warning}")
        if not self._console.is_terminal:
            self._print_now_and_then()

    def tell(self, words: str) -> None:
        """Print a line, once."""
        if words not in self._told:
            self._told.add(words)
            self._console.print(f"  {words}", highlight=False, markup=False, soft_wrap=True)

    def _print_now_and_then(self) -> None:
        passed, line = time.monotonic() - self._printed, self.line()
        if passed >= (SAME_LINE_EVERY_SECONDS if line == self._line else LINE_EVERY_SECONDS):
            self._printed, self._line = time.monotonic(), line
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def line(self) -> str:
        """The progress as one plain line."""
        task = self._progress.tasks[0]
        parts = [_steps(task), task.fields["detail"], _rate(task), _eta(task)]
        return "  ".join([f"  {task.description}", *(part for part in parts if part)])


class _Text(ProgressColumn):
    """A column whose text is made by a function of the task."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self._make = make

    def render(self, task: Task) -> str:
        return self._make(task)


def _columns(width: int) -> list[ProgressColumn]:
    name, bar, steps = TextColumn("  {task.description}", markup=False), BarColumn(bar_width=None), _Text(_steps)
    if width < NARROW:
        return [name, steps, _Text(_eta)]
    return [name, bar, steps, TextColumn("{task.fields[detail]}", markup=False), _Text(_rate), _Text(_eta)]


def _detail(status: Status, metrics: dict[str, Any]) -> str:
    if status.step and "rollout/score" in metrics:  # the loss of such a method tells nothing of its progress
        return _rollout(metrics)
    if status.step and "loss" in metrics:
        return f"loss {metrics['loss']:.4g}"
    return status.message or (status.state if status.state == "starting" else "")


def _rollout(metrics: dict[str, Any]) -> str:
    """The latest rollout: its scores, how far it is from the reference, how long and whole its completions are."""
    parts = [
        f"{name.removeprefix('score/')} {value:.3g}" for name, value in metrics.items() if name.startswith("score/")
    ]
    kl = metrics.get("rollout/kl", metrics.get("policy/kl"))
    parts += [] if kl is None else [f"KL {kl:.2g}"]
    parts.append(f"{metrics['rollout/length']:.0f} tokens")
    if metrics["rollout/ended"] < 1:
        parts.append(f"{1 - metrics['rollout/ended']:.0%} cut off")
    return "  ".join(parts)


def _steps(task: Task) -> str:
    return f"{task.completed:.0f}/{task.total:.0f}" if task.total else ""


def _rate(task: Task) -> str:
    if not task.speed:
        return ""
    return f"{task.speed:.1f} it/s" if task.speed >= 1 else f"{1 / task.speed:.1f} s/it"


def _eta(task: Task) -> str:
    if not task.total or task.time_remaining is None:
        return ""
    return f"ETA {clock(task.time_remaining)}"


def clock(seconds: float) -> str:
    """Seconds as people read them: 0:07, 12:30, 3:02:01."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
