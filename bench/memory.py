"""Live tensor memory: the most bytes of tensors that exist at once while something runs, beyond those from before.

Not the memory of the process, which holds libraries, an allocator's caches and the weights of other arms as well. On a
CPU the profiler tells every allocation and release of torch's allocator; on a GPU the allocator keeps count.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """Most tensor bytes that lived at once during a call, over those that lived at its beginning.

    Args:
        function: Leaves nothing behind: gradients that it makes are released inside.
        device: Where it computes.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):  # a stable sort: events of one moment keep their order
        live += event.nbytes()
        highest = max(highest, live)
    return highest


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that the profiler writes to the standard error of the process."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors; one that several of them share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the scales that belong to quantised weights."""
    yield from module.buffers()
    for parameter in module.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        for each in () if state is None else (state, *([state.state2] if state.nested else [])):
            yield from (t for t in vars(each).values() if isinstance(t, Tensor))
