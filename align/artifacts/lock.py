"""A lock that the kernel drops when its holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.errors import LaunchError

PATIENCE_SECONDS = 0.5
"""Long enough for `is_locked` to look."""


class Busy(LaunchError):
    """Somebody else holds the lock."""


@contextmanager
def locked(path: Path, what: str, patience: float = PATIENCE_SECONDS) -> Iterator[int]:
    """Hold a lock file; its text tells who holds it.

    Args:
        path: The file. Its holder may delete it, its folder too.
        what: What is being done under the lock, for the message that others get.
        patience: Seconds to wait for somebody else.

    Yields:
        The descriptor. A child process that inherits it holds the lock for as long as it lives.

    Raises:
        Busy: Somebody else has it.
        LaunchError: The file system has no locks.
    """
    descriptor = _take(path, patience)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()} {what}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock file now."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _take(path: Path, patience: float) -> int:
    end = time.monotonic() + patience
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its folder too may have been deleted just now
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            _flock(descriptor, end)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            os.close(descriptor)
            raise _busy(holder, path) from None
        except OSError as error:
            os.close(descriptor)
            raise LaunchError(
                f"cannot lock a file here: {error.strerror}",
                where=str(path),
                fix="set ALIGN_HOME to a folder on a file system with locks (flock)",
            ) from None
        os.close(descriptor)  # it was deleted between opening and locking, and keeps nobody out


def _flock(descriptor: int, end: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.05)


def _is_at(descriptor: int, path: Path) -> bool:
    own = os.fstat(descriptor)
    try:
        other = path.stat()
    except FileNotFoundError:
        return False
    return (own.st_dev, own.st_ino) == (other.st_dev, other.st_ino)


def _busy(holder: str, path: Path) -> Busy:
    pid, host, what = [*holder.strip().split(" ", 2), "", "", ""][:3]
    there = f" on {host}" if host and host != socket.gethostname() else ""
    return Busy(
        f"another `align run` (pid {pid or 'unknown'}{there}) is working on {what or 'this'}",
        where=str(path.parent),
        fix="wait until it is done, or stop it; then run the same command again",
    )
