"""The whole of a recipe as one pydantic model: the tagged union of every registered kind."""

from __future__ import annotations

import operator
from functools import cache, reduce
from typing import Annotated, Any

from pydantic import Field, create_model

from align.methods import all_methods
from align.spec.base import Settings, cosmetic
from align.spec.data import DataSource
from align.spec.kinds import OTHER_KINDS
from align.spec.model import ModelSettings
from align.spec.stages import Stage
from align.spec.train import LaunchSettings, LoggingSettings


@cache
def stage_kinds() -> dict[str, type[Stage]]:
    """Every kind a stage may have, with its settings class."""
    kinds: dict[str, type[Stage]] = {name: m.config for name, m in all_methods().items()}
    return kinds | OTHER_KINDS


class RecipeBase(Settings):
    """The fields of a recipe apart from its stages."""

    name: str = cosmetic(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder name of the recipe's runs."""
    description: str = cosmetic("")
    model: ModelSettings | None = None
    """The model of every stage that trains a policy."""
    data: dict[str, DataSource] = Field(default_factory=dict)
    launch: LaunchSettings = cosmetic(LaunchSettings())
    logging: LoggingSettings = cosmetic(LoggingSettings())


@cache
def recipe_model() -> type[RecipeBase]:
    """`RecipeBase` with `stages`: a dict of name -> any registered kind, told apart by `kind`."""
    union: Any = reduce(operator.or_, stage_kinds().values())
    stages = dict[str, Annotated[union, Field(discriminator="kind")]]
    return create_model("Recipe", __base__=RecipeBase, __doc__="One recipe is one graph.", stages=(stages, ...))
