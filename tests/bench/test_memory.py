"""The counter of live tensor bytes, against computations whose peak is known."""

from __future__ import annotations

import torch

from bench.memory import peak_bytes

CPU = torch.device("cpu")
N = 1000
SIZE = 4 * N


def test_temporaries_are_counted_while_they_live() -> None:
    def run() -> None:
        a = torch.empty(N)  # 1
        b = a * 2  # 2
        c = a + b  # 3
        del b  # 2
        d = c * c  # 3
        del a, c  # 1
        d.exp()  # 2

    assert peak_bytes(run, CPU) == 3 * SIZE


def test_saved_activations_and_gradients() -> None:
    w = torch.randn(N, requires_grad=True)

    def run() -> None:
        y = w
        for _ in range(5):
            y = y.exp()  # every exp keeps its result
        y.sum().backward()
        w.grad = None

    # Five results, the sum and its gradient of one number each, and in backward a gradient and the one made from it.
    assert peak_bytes(run, CPU) == 7 * SIZE + 2 * 4


def test_what_lived_before_is_not_counted() -> None:
    kept = [torch.empty(N) for _ in range(10)]
    assert peak_bytes(lambda: torch.empty(N // 2), CPU) == SIZE // 2
    assert peak_bytes(lambda: torch.add(kept[0], kept[1]), CPU) == SIZE


def test_memory_inside_an_operation_is_counted() -> None:
    """The result has 64 numbers; what is summed, 64 x 64 of them, lives inside the one operation."""
    a = torch.randn(64, 64)
    assert 4 * 64 * 64 <= peak_bytes(lambda: torch.logsumexp(a, 1), CPU) <= 2 * 4 * 64 * 64


def test_the_same_again() -> None:
    layer = torch.nn.Linear(64, 64)

    def run() -> None:
        layer(torch.ones(32, 64)).relu().sum().backward()
        layer.zero_grad(set_to_none=True)

    assert len({peak_bytes(run, CPU) for _ in range(3)}) == 1
