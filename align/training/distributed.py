"""Start and end of a process group, for CPU (gloo) and GPU (nccl), with and without DeepSpeed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist


@contextlib.contextmanager
def process_group(deepspeed: bool) -> Iterator[None]:
    """Join the group that the launcher announced in RANK and WORLD_SIZE; leave it in order.

    Without the barrier and the destroy some ranks abort at exit although training and saving had finished.
    """
    if "RANK" not in os.environ:
        yield
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if deepspeed:
        import deepspeed as ds

        # Without this DeepSpeed compiles a communication kernel, or fails where there is no compiler.
        ds.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        ds.init_distributed(dist_backend=backend)
    elif not dist.is_initialized():
        dist.init_process_group(backend)
    ended_well = False
    try:
        yield
        ended_well = True
    finally:
        if dist.is_initialized():
            if ended_well:
                dist.barrier()
            dist.destroy_process_group()
