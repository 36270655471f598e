"""Settings that were written and that nothing would read: each is an error, since its author expects an effect.

What depends on one settings object alone its class declares itself (`Settings.unread`); what depends on two is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align.errors import RecipeError
from align.methods.sft import SFT
from align.recipe.load import LoadedRecipe
from align.recipe.origins import Loc
from align.spec.base import Settings, Unread
from align.spec.sample import SampleStage


def check_ignored(loaded: LoadedRecipe) -> Iterator[RecipeError]:
    """Every setting of the recipe that was written and has no effect."""
    for loc, settings in _within(loaded.recipe, ()):
        for each in declared(type(settings)):
            if (
                each.field in settings.model_fields_set
                and each.when(settings)
                and not _is_default(settings, each.field)
            ):
                yield _error(loaded, (*loc, each.field), each.why, each.fix)
    yield from _loss_on_text(loaded)
    yield from _draws_of_beams(loaded)


def _is_default(settings: Settings, field: str) -> bool:
    """Whether a setting says what holds anyway: nobody waits for its effect, and the copy of a recipe says them all."""
    default = type(settings).model_fields[field].get_default(call_default_factory=True)
    return bool(getattr(settings, field) == default)


def declared(kind: type[Settings]) -> list[Unread]:
    """What a settings class and its bases declare."""
    return [each for cls in kind.__mro__ for each in vars(cls).get("unread", ())]


def _within(value: Any, loc: Loc) -> Iterator[tuple[Loc, Settings]]:
    """Every settings object in a value with its place, outer ones first."""
    if isinstance(value, Settings):
        yield loc, value
        for name in type(value).model_fields:
            yield from _within(getattr(value, name), (*loc, name))
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _within(item, (*loc, key))


def _loss_on_text(loaded: LoadedRecipe) -> Iterator[RecipeError]:
    for name, stage in loaded.stages.items():
        source = loaded.recipe.data.get(stage.data) if isinstance(stage, SFT) else None
        if source is not None and source.format == "text" and "loss_on" in stage.model_fields_set:
            yield _error(
                loaded,
                ("stages", name, "loss_on"),
                "plain text has no answers, all its tokens are trained",
                "remove it, or name data of another format",
            )


def _draws_of_beams(loaded: LoadedRecipe) -> Iterator[RecipeError]:
    for name, stage in loaded.stages.items():
        if not isinstance(stage, SampleStage) or stage.decoding == "sample":
            continue
        for field in ("top_p", "top_k", "seed"):
            if field in stage.generation.model_fields_set and not _is_default(stage.generation, field):
                loc = ("stages", name, "generation", field)
                yield _error(loaded, loc, "beams are searched, not drawn", "remove it, or write `decoding: sample`")


def _error(loaded: LoadedRecipe, loc: Loc, why: str, fix: str) -> RecipeError:
    return RecipeError(f"`{loc[-1]}` has no effect: {why}", where=loaded.where(*loc), fix=fix)
