"""Settings that were written and that nothing would read: each is an error, since its author expects an effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from align.errors import RecipeError
from align.recipe.load import LoadedRecipe
from align.recipe.origins import Loc
from align.spec.base import Settings
from align.spec.data import DataSettings
from align.spec.train import TrainSettings


@dataclass(frozen=True)
class Ignored:
    """A setting without effect.

    Attributes:
        settings: The class it belongs to.
        field: The setting.
        when: Whether the other settings make it so.
        why: The reason.
        fix: What to do.
    """

    settings: type[Settings]
    field: str
    when: Callable[[Any], bool]
    why: str
    fix: str


IGNORED = (
    Ignored(
        TrainSettings,
        "warmup_ratio",
        lambda train: train.lr_scheduler == "constant" and train.warmup_ratio > 0,
        "a constant learning rate has no warm-up",
        "remove it, or write lr_scheduler: linear or cosine",
    ),
    Ignored(
        DataSettings,
        "system",
        lambda data: data.format == "text",
        "records of format text are no conversations",
        "remove it, or choose another format",
    ),
)


def check_ignored(loaded: LoadedRecipe) -> Iterator[RecipeError]:
    """Every setting of the recipe that was written and has no effect."""
    places: list[tuple[Loc, Settings]] = [(("data", name), source) for name, source in loaded.recipe.data.items()]
    places += [
        (("stages", name, "train"), train)
        for name, stage in loaded.stages.items()
        if (train := getattr(stage, "train", None))
    ]
    for loc, settings in places:
        for rule in IGNORED:
            if isinstance(settings, rule.settings) and rule.field in settings.model_fields_set and rule.when(settings):
                yield RecipeError(
                    f"`{rule.field}` has no effect: {rule.why}", where=loaded.where(*loc, rule.field), fix=rule.fix
                )
