"""The few collectives a step needs. Without a process group every one of them is the identity."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """This process's place in the group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def gather_rows(values: list[float], device: torch.device) -> torch.Tensor:
    """[W, len(values)] fp64: the same short list from every rank, in rank order."""
    row = torch.tensor(values, dtype=torch.float64, device=device)
    if not dist.is_initialized():
        return row.unsqueeze(0)
    rows = [torch.empty_like(row) for _ in range(world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)


def gather_objects(value: T) -> list[T]:
    """One object per rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    out: list[T] = [value] * world_size()
    dist.all_gather_object(out, value)
    return out
