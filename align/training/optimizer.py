"""Groups of an optimizer: a second trained role may have a learning rate of its own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer


def set_apart(optimizer: Optimizer, parameters: Iterable[Tensor], rate: float) -> None:
    """Move some parameters into groups that are like theirs but for the learning rate; before a schedule is made.

    Args:
        optimizer: A new one.
        parameters: Some of those it has.
        rate: Their learning rate.
    """
    own = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        apart = [p for p in group["params"] if id(p) in own]
        if apart:
            group["params"] = [p for p in group["params"] if id(p) not in own]
            optimizer.add_param_group({**group, "params": apart, "lr": rate})
