"""Real processes for tests: forked, so that nothing is imported twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FILE_EVENTS = ("open", "os.")
"""Audit events of the interpreter that come before a file operation."""


def fork(work: Callable[[], Any]) -> int:
    """Run `work` in a child; its pid. The child ends with code 0, or 1 after an exception."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            sys.stderr.write(f"child: {type(error).__name__}: {error}\n")
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """The child's exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_before_file_operation(n: int) -> None:
    """Make this process vanish, as by a power cut, right before its n-th operation on files (from 0)."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event.startswith(FILE_EVENTS):
            if count == n:
                os._exit(9)
            count += 1

    sys.addaudithook(hook)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of that size, mounted on a new folder; skips the test where mounting is not allowed."""
    folder.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(argv, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
