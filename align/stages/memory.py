"""How much memory a stage took, and giving it back."""

from __future__ import annotations

import gc
import resource

import torch


def peak_memory() -> int:
    """Bytes: on a GPU what the allocator held at most, on a CPU the resident set of this process at most."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory() -> None:
    """Give back what models held that nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
