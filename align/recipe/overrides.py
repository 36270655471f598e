"""`--set a.b=c`: one value of a recipe, replaced before it is checked."""

from __future__ import annotations

from typing import Any

from align.errors import RecipeError
from align.recipe.document import Loc, Origins, dotted, parse_value
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
    loc: Loc = tuple(int(item) if item.isdigit() else item for item in path.strip().split("."))
    if not equals or "" in loc:
        raise RecipeError("an override wants a path and a value", where=where, fix="write --set stages.dpo.beta=0.2")
    around: Any = data
    for depth, item in enumerate(loc):
        _check_step(around, loc, depth, where)
        if depth == len(loc) - 1:
            around[_key(around, item)] = parse_value(value, where)
        else:
            inner = around.get(item) if isinstance(around, dict) else around[item]
            if inner is None:
                inner = around[_key(around, item)] = {}
            around = inner
    origins.forget(loc)
    origins.overrides[loc] = where


def _key(around: Any, item: str | int) -> str | int:
    return str(item) if isinstance(around, dict) else item


def _check_step(around: Any, loc: Loc, depth: int, where: str) -> None:
    item, outer = loc[depth], loc[:depth]
    if isinstance(around, list):
        if not isinstance(item, int) or item >= len(around):
            fix = f"write a number from 0 to {len(around) - 1}, or set the whole list"
            raise RecipeError(f"`{dotted(outer)}` is a list of {len(around)}", where=where, fix=fix)
    elif not isinstance(around, dict):
        raise RecipeError(f"`{dotted(outer)}` is no mapping", where=where, fix=f"set the whole of `{dotted(outer)}`")
    elif outer in NAMED and str(item) not in around and depth < len(loc) - 1:
        raise RecipeError(
            f"`{dotted(outer)}` has no entry `{item}`{did_you_mean(str(item), around)}",
            where=where,
            fix=f"one of: {', '.join(around) or 'none'}",
        )
