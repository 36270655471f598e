"""Forked ranks: the parent has imported everything, so a two-rank test costs a second instead of eight."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

from align.training.distributed import process_group


def _rank(
    rank: int, world: int, port: int, function: Callable[..., Any], args: tuple, deepspeed: bool, out: Any
) -> None:
    gc.freeze()  # DeepSpeed collects at its start, and would go through all that the parent has made
    # One rank without DeepSpeed is what `python` alone starts: no process group at all.
    if world > 1 or deepspeed:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world),
            LOCAL_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            DS_ACCELERATOR="cpu",
        )
    try:
        with process_group(deepspeed):
            out.put((rank, "value", function(rank, world, *args)))
    except BaseException as error:
        out.put((rank, "error", (type(error).__name__, str(error), traceback.format_exc())))


class RankError(Exception):
    """A rank raised; holds what each rank reported."""

    def __init__(self, reports: dict[int, tuple[str, Any]]) -> None:
        super().__init__("\n".join(str(r) for r in reports.values()))
        self.reports = reports


def run_ranks(
    function: Callable[..., Any], *args: Any, world: int = 2, deepspeed: bool = False, timeout: float = 120
) -> list[Any]:
    """Run `function(rank, world, *args)` on forked ranks and return their values in rank order.

    Raises:
        RankError: If a rank raised or did not answer in time; the others are stopped.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, world, port, function, args, deepspeed, out)) for r in range(world)]
    for process in ranks:
        process.start()
    seen: dict[int, tuple[str, Any]] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(seen) < world:
            try:
                rank, kind, value = out.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                break
            seen[rank] = (kind, value)
        for process in ranks:
            process.join(10)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
    if len(seen) < world or any(kind == "error" for kind, _ in seen.values()):
        raise RankError(seen)
    return [seen[r][1] for r in range(world)]
