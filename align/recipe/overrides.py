"""`--set a.b=c`: one value of a recipe, replaced before it is checked."""

from __future__ import annotations

import re
from typing import Any

from align.errors import RecipeError
from align.recipe.document import parse_value
from align.recipe.origins import Loc, Origins, dotted
from align.recipe.suggest import did_you_mean

NAMED: tuple[Loc, ...] = (("stages",), ("data",))
"""Mappings whose keys are the author's own: an override may change an entry, not invent one piecemeal."""


def apply_override(data: dict[str, Any], text: str, origins: Origins) -> None:
    """Write the value of ``a.b=c`` into the data, in place.

    The value is read as it would be in the recipe: ``1e-4`` is a number, ``[a, b]`` a list. Mappings on the way
    that are absent are made; unknown keys are found when the recipe is checked.

    Raises:
        RecipeError: It has no ``=``, a path through a value that is no mapping, or no such stage, entry or list item.
    """
    where = f"--set {text}"
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or "" in keys:
        raise RecipeError("an override wants a path and a value", where=where, fix="write --set stages.dpo.beta=0.2")
    around: Any = data
    loc: Loc = ()
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        step = _step(around, loc, key, last, where)
        loc = (*loc, step)
        if last:
            around[step] = parse_value(value, where)
        elif isinstance(around, dict) and around.get(step) is None:
            around[step] = {}
        around = around[step]
    origins.forget(loc)
    origins.overrides[loc] = where


def _step(around: Any, outer: Loc, key: str, last: bool, where: str) -> str | int:
    """The key or position that one part of the path stands for."""
    if isinstance(around, list):
        if not re.fullmatch("[0-9]{1,6}", key) or int(key) >= len(around):
            fix = f"write a number from 0 to {len(around) - 1}, or set the whole list"
            raise RecipeError(f"`{dotted(outer)}` is a list of {len(around)}", where=where, fix=fix)
        return int(key)
    if not isinstance(around, dict):
        raise RecipeError(f"`{dotted(outer)}` is no mapping", where=where, fix=f"set the whole of `{dotted(outer)}`")
    if outer in NAMED and key not in around and not last:
        raise RecipeError(
            f"`{dotted(outer)}` has no entry `{key}`{did_you_mean(key, around)}",
            where=where,
            fix=f"one of: {', '.join(around) or 'none'}",
        )
    return key
