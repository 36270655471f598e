"""Discovery and the registry of training methods.

A method is one file here (or in another package, through the entry point group `align.methods`): a config class and a
pure loss, joined by the `@method` decorator. Nothing else has to be edited to add one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args, get_origin

from align.errors import AlignError, LaunchError
from align.spec.kinds import OTHER_KINDS
from align.spec.online import RolloutStage
from align.spec.stages import PairedStage, RankedStage, TokensStage, TrainedStage, UnpairedStage
from align.types import Advantages, Batch, LossOutput, Needs, Rollout, Term


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
        advantages: ``(rollout, config) -> Advantages``, for a method on rollouts: what it makes of the scores, once per
            rollout.
    """

    kind: str
    config: type[TrainedStage]
    loss: Callable[[Any, Any], LossOutput]
    batch: Batch
    needs: frozenset[Needs]
    reference: bool
    source: str
    statistic: Callable[[Any, Any], dict[str, Term]] | None = None
    advantages: Callable[[Rollout, Any], Advantages] | None = None

    @property
    def summary(self) -> str:
        """The first line of the module's docstring."""
        module = importlib.import_module(self.loss.__module__)
        return (module.__doc__ or "").strip().split("\n")[0]


_REGISTRY: dict[str, Method] = {}

GROUP = "align.methods"
"""Entry point group in which other packages name modules that hold methods."""

STAGE_OF: dict[Batch, type[TrainedStage]] = {
    Batch.TOKENS: TokensStage,
    Batch.PAIRED: PairedStage,
    Batch.UNPAIRED: UnpairedStage,
    Batch.RANKED: RankedStage,
    Batch.ROLLOUT: RolloutStage,
}
"""The base class whose data makes a batch."""


def method(
    config: type[TrainedStage],
    *,
    batch: Batch,
    needs: set[Needs],
    reference: bool,
    source: str,
    statistic: Callable[[Any, Any], dict[str, Term]] | None = None,
    advantages: Callable[[Rollout, Any], Advantages] | None = None,
) -> Callable[[Callable[[Any, Any], LossOutput]], Callable[[Any, Any], LossOutput]]:
    """Register a loss under its config's `kind`.

    Raises:
        LaunchError: The declaration does not fit the config, or another loss has that kind already.
    """

    def register(loss: Callable[[Any, Any], LossOutput]) -> Callable[[Any, Any], LossOutput]:
        complaints = _complaints(config, batch, needs, reference, statistic is not None, advantages is not None)
        for message, fix in complaints:
            raise LaunchError(message, where=_place(loss), fix=fix)
        kind = config.model_fields["kind"].default
        if kind in _REGISTRY and _place(_REGISTRY[kind].loss) != _place(loss):
            raise LaunchError(
                f"two losses have the kind `{kind}`: {_place(_REGISTRY[kind].loss)} and {_place(loss)}",
                fix="rename one, or uninstall the package that registers it",
            )
        _REGISTRY[kind] = Method(kind, config, loss, batch, frozenset(needs), reference, source, statistic, advantages)
        return loss

    return register


def _place(loss: Callable[..., Any]) -> str:
    return f"{loss.__module__}.{loss.__qualname__}"


def _complaints(
    config: type[TrainedStage], batch: Batch, needs: set[Needs], reference: bool, statistic: bool, advantages: bool
) -> Iterator[tuple[str, str]]:
    """Where a declaration does not fit its settings class, and what to do."""
    name, fields = config.__name__, config.model_fields
    kind = fields.get("kind")
    if kind is None or get_origin(kind.annotation) is not Literal or get_args(kind.annotation) != (kind.default,):
        yield f'{name} needs `kind: Literal["name"] = "name"`, the name that recipes use', f"write it into {name}"
    elif kind.default in OTHER_KINDS:
        yield f"the kind `{kind.default}` is taken: a stage of it does not train", "choose another name"
    if not _fits(config, batch):
        base = STAGE_OF[batch].__name__
        fix = f"derive {name} from align.spec.stages.{base}, or declare the batch of its own base class"
        yield f"batch=Batch.{batch.name} goes with {base}, and {name} does not stand on it", fix
    if reference != ("reference" in fields):
        has = "has a" if "reference" in fields else "has no"
        fix = f"write reference={not reference}, or " + ("mix in" if reference else "leave out") + " `Referenced`"
        yield f"reference={reference}, but {name} {has} field `reference`", fix
    if reference and batch in (Batch.TOKENS, Batch.RANKED):
        fix = "write reference=False and leave out `Referenced`, or take PAIRED or UNPAIRED"
        yield f"reference=True, but a batch of {batch.name} hands no reference over", fix
    if Needs.PROMPT_LOGPS in needs and "loss_on" not in fields:
        fix = 'add `loss_on: Literal["completion", "all"] = "completion"`, or leave PROMPT_LOGPS out'
        yield f"Needs.PROMPT_LOGPS is read under `loss_on: all`, and {name} has no field `loss_on`", fix
    if Needs.PROMPT_LOGPS in needs and batch is not Batch.PAIRED:
        fix = "leave it out; with batch=Batch.TOKENS, `loss_on: all` trains whole sequences anyway"
        yield f"Needs.PROMPT_LOGPS comes with batch=Batch.PAIRED only, not with {batch.name}", fix
    if statistic and batch is not Batch.UNPAIRED:
        fix = "leave it out, or take UNPAIRED: its rows carry another prompt's completion for it"
        yield f"a `statistic` comes with batch=Batch.UNPAIRED only, not with {batch.name}", fix
    if Needs.REWARDS in needs and batch is not Batch.RANKED:
        fix = "write batch=Batch.RANKED (a pair is a list of two), or needs={Needs.LOGPS}"
        yield f"Needs.REWARDS comes with batch=Batch.RANKED only, not with {batch.name}", fix
    if needs & {Needs.TOKEN_LOGPS, Needs.VALUES} and batch is not Batch.ROLLOUT:
        fix = "write batch=Batch.ROLLOUT, or needs={Needs.LOGPS}"
        yield f"Needs.TOKEN_LOGPS and VALUES come with batch=Batch.ROLLOUT only, not with {batch.name}", fix
    if advantages != (batch is Batch.ROLLOUT):
        has = "has `advantages`" if advantages else "has no `advantages`"
        fix = "give `advantages=` to a method on rollouts, and to no other"
        yield f"a method with batch=Batch.{batch.name} {has}", fix
    if not needs & ({Needs.TOKEN_LOGPS} if batch is Batch.ROLLOUT else {Needs.LOGPS, Needs.REWARDS}):
        wanted, fix = ("TOKEN_LOGPS",) * 2 if batch is Batch.ROLLOUT else ("neither LOGPS nor REWARDS", "LOGPS")
        yield (
            f"`needs` has {'no ' * (wanted == fix)}{wanted}: there is nothing to train on",
            f"write needs={{Needs.{fix}}}",
        )


def _fits(config: type[TrainedStage], batch: Batch) -> bool:
    """Whether the data that the settings name make that batch; TOKENS may come from a data field of one's own."""
    if not issubclass(config, TrainedStage) or batch is not Batch.TOKENS:
        return issubclass(config, STAGE_OF[batch])
    others = tuple(stage for each, stage in STAGE_OF.items() if each is not batch)
    return "data" in config.model_fields and not issubclass(config, others)


@cache
def _import_own() -> None:
    for module in pkgutil.iter_modules(__path__):
        if module.name != "ops":
            importlib.import_module(f"{__name__}.{module.name}")


@cache
def _discover() -> None:
    _import_own()
    for entry in entry_points(group=GROUP):
        load_plugin(entry)


def load_plugin(entry: EntryPoint) -> list[str]:
    """Import what another package registers.

    Returns:
        The kinds of its methods.

    Raises:
        LaunchError: It cannot be imported, or holds no method.
    """
    _import_own()
    package = f" of {entry.dist.name}" if entry.dist is not None else ""
    told, before = f"{GROUP} `{entry.name}` ({entry.value}){package}", set(_REGISTRY)
    try:
        found = entry.load()
    except AlignError:
        raise
    except Exception as error:
        raise LaunchError(
            f"{told} cannot be imported: {type(error).__name__}: {error}",
            fix="install what it needs, or reinstall or uninstall the package that registers it",
        ) from error
    held = {id(found), *map(id, getattr(found, "__dict__", {}).values())}  # of a module that was imported before
    kinds = [kind for kind, each in _REGISTRY.items() if kind not in before or id(each.loss) in held]
    if not kinds:
        raise LaunchError(f"{told} registers no method; is `@method` missing?", fix="decorate its loss with `@method`")
    return kinds


def all_methods() -> dict[str, Method]:
    """Every method by kind, sorted."""
    _discover()
    return dict(sorted(_REGISTRY.items()))


def get_method(kind: str) -> Method:
    """The method of that kind; KeyError if there is none."""
    _discover()
    return _REGISTRY[kind]
