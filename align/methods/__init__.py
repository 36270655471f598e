"""Discovery and the registry of training methods.

A method is one file here (or in another package, through the entry point group `align.methods`): a config class and a
pure loss, joined by the `@method` decorator. Nothing else has to be edited to add one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from align.spec.stages import TrainedStage
from align.types import Batch, LossOutput, Needs, Term


@dataclass(frozen=True)
class Method:
    """One training method.

    Attributes:
        kind: The name a recipe uses.
        config: Its settings class; `config.model_fields["kind"]` is the discriminator.
        loss: ``(logps, config) -> LossOutput``, pure.
        batch: What an example is made of.
        needs: What the engine has to compute.
        reference: Whether the loss reads the reference's log-probabilities.
        source: Paper and equation.
        statistic: ``(logps, config) -> {name: Term}``, for a quantity of the whole optimizer step that the loss reads:
            computed without gradient over all packs and ranks first, handed in as ``logps.statistics[name]``.
    """

    kind: str
    config: type[TrainedStage]
    loss: Callable[[Any, Any], LossOutput]
    batch: Batch
    needs: frozenset[Needs]
    reference: bool
    source: str
    statistic: Callable[[Any, Any], dict[str, Term]] | None = None

    @property
    def summary(self) -> str:
        """The first line of the module's docstring."""
        module = importlib.import_module(self.loss.__module__)
        return (module.__doc__ or "").strip().split("\n")[0]


_REGISTRY: dict[str, Method] = {}


def method(
    config: type[TrainedStage],
    *,
    batch: Batch,
    needs: set[Needs],
    reference: bool,
    source: str,
    statistic: Callable[[Any, Any], dict[str, Term]] | None = None,
) -> Callable[[Callable[[Any, Any], LossOutput]], Callable[[Any, Any], LossOutput]]:
    """Register a loss under its config's `kind`.

    Raises:
        ValueError: If another method has that kind already.
    """

    def register(loss: Callable[[Any, Any], LossOutput]) -> Callable[[Any, Any], LossOutput]:
        kind = config.model_fields["kind"].default
        if kind in _REGISTRY and _REGISTRY[kind].loss.__module__ != loss.__module__:
            raise ValueError(f"two methods are called {kind!r}: {_REGISTRY[kind].loss.__module__}, {loss.__module__}")
        _REGISTRY[kind] = Method(kind, config, loss, batch, frozenset(needs), reference, source, statistic)
        return loss

    return register


@cache
def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        if module.name != "ops":
            importlib.import_module(f"{__name__}.{module.name}")
    for entry in entry_points(group="align.methods"):
        entry.load()


def all_methods() -> dict[str, Method]:
    """Every method by kind, sorted."""
    _discover()
    return dict(sorted(_REGISTRY.items()))


def get_method(kind: str) -> Method:
    """The method of that kind; KeyError if there is none."""
    _discover()
    return _REGISTRY[kind]
