"""Decode steps as CUDA graphs, since launching its kernels one by one takes longer than a small model's step.

Experimental: written without a GPU at hand, and not yet run on one. What cannot be captured runs as it would without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class StepGraphs:
    """Graphs by the shapes they are for.

    A graph holds the addresses of all tensors that its step touches, so it lives no longer than these.
    """

    def __init__(self) -> None:
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.seen: set[Hashable] = set()
        self.works = True
        self.pool: Any = None
        """Memory of all graphs: one is replayed after the other, and what it returns is read before the next."""

    def __call__(self, key: Hashable, step: Callable[[], Tensor]) -> Tensor:
        """Run a step that changes tensors in place and returns one.

        Args:
            key: What the shapes of all its tensors follow from.
            step: The same computation on the same tensors for the same key.
        """
        if key not in self.seen or not self.works:  # the first time lets libraries settle, which capture forbids
            self.seen.add(key)
            return step()
        if key not in self.graphs:
            captured = self._capture(step)
            if captured is None:
                return step()
            self.graphs[key] = captured
        graph, out = self.graphs[key]
        graph.replay()
        return out

    def _capture(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        """Record a step without running it; None if it cannot be recorded."""
        try:
            torch.cuda.synchronize()
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                out = step()
        except Exception as error:  # whatever a model's kernels raise here, they run without a graph
            logger.warning("decoding runs without CUDA graphs (%s: %s)", type(error).__name__, error)
            self.works = False
            return None
        return graph, out
