"""One pydantic error in the words of a recipe."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, get_origin

from align.recipe.origins import Loc, dotted
from align.recipe.shape import (
    Model,
    Spot,
    alternatives,
    annotation_of,
    describe,
    discriminator_tag,
    either,
    listed,
    locate,
    metadata,
    models_in,
    outline,
    strip,
)
from align.recipe.suggest import nearest

SLIP, VALUE, MISSING = 0, 1, 2
"""Order of telling: what is misspelt often explains what seems missing."""


@dataclass(frozen=True)
class Problem:
    """One mistake: when it is told, where it stands in the (mended) data, what it is, what to do."""

    rank: int
    loc: Loc
    message: str
    fix: str | None


def explain(model: Model, data: Any, errors: list[Any]) -> list[Problem]:
    """What pydantic found, one problem per mistake: the members of a union count once."""
    problems: dict[tuple[Loc, str], Problem] = {}
    for error in errors:
        problem = _explain(locate(model, error["loc"]), error, data)
        if problem is not None:
            problems.setdefault((problem.loc, problem.message), problem)
    return list(problems.values())


def outline_of(value: Any) -> str:
    """`dict`, `list` or `scalar`: the outer form of a value."""
    return type(value).__name__ if isinstance(value, dict | list) else "scalar"


def value_at(data: Any, loc: Loc) -> Any:
    """The value at a place; None where there is none."""
    for item in loc:
        try:
            data = data[item]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def shown(value: Any, limit: int = 60) -> str:
    """A value as YAML writes it, cut to a line."""
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _explain(spot: Spot, error: Any, data: Any) -> Problem | None:
    for loc, annotation, member in spot.choices:
        form = outline_of(value_at(data, loc))
        if form == "scalar" or all(outline(each) != form for each in alternatives(annotation)):
            return _wrong_value(loc, annotation, value_at(data, loc))
        if member is None or outline(member) != form:
            return None
    kind, value = error["type"], value_at(data, spot.loc)
    if kind == "extra_forbidden":
        return _unknown_key(spot)
    if kind == "missing":
        return _missing(spot)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _no_kind(spot, error, value)
    if kind == "literal_error" or kind.endswith("_type") or kind == "int_from_float":
        return _wrong_value(spot.loc, spot.expected, value)
    return _out_of_bounds(spot, error, value)


_BOUNDS = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
_SAID = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}


def _out_of_bounds(spot: Spot, error: Any, value: Any) -> Problem:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        bound = context[_BOUNDS[kind]]
        number = int(bound) if bound == int(bound) else bound
        limits = [
            f"{_SAID[key]} {getattr(mark, key):g}"
            for mark in metadata(_only(spot.expected))
            for key in _SAID
            if hasattr(mark, key)
        ]
        fix = f"write a number {' and '.join(limits or [f'{_SAID[_BOUNDS[kind]]} {number}'])}"
        return Problem(VALUE, spot.loc, f"{shown(value)} is out of range: must be {_SAID[_BOUNDS[kind]]} {number}", fix)
    if kind == "too_short":
        return Problem(VALUE, spot.loc, f"{shown(value)} is too short", f"give at least {context['min_length']}")
    if kind == "string_pattern_mismatch":
        return Problem(
            VALUE, spot.loc, f"{shown(value)} has a character that is not allowed", f"must match {context['pattern']}"
        )
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return Problem(VALUE, spot.loc, message, None)


def _only(annotation: Any) -> Any:
    """The annotation itself, or the one type that may be given instead of nothing."""
    members = alternatives(annotation)
    return members[0] if len(members) == 1 else annotation


def _wrong_value(loc: Loc, annotation: Any, value: Any) -> Problem:
    fix = _as_expected(annotation, value) or f"write {describe(annotation)}"
    expected = "one of the choices" if _is_choice(annotation) else describe(annotation, keys=False)
    return Problem(
        VALUE, loc, f"{shown(value)} is not {expected}" if value is not None else f"must be {expected}, not empty", fix
    )


def _is_choice(annotation: Any) -> bool:
    return all(get_origin(strip(each)) is Literal for each in alternatives(annotation))


def _as_expected(annotation: Any, value: Any) -> str | None:
    """What the author of a value of the wrong type most likely wanted to write."""
    kinds = {strip(each) for each in alternatives(annotation)}
    if isinstance(value, str):
        for model in models_in(annotation):
            if discriminator_tag(model, "kind") == value:
                return f"write {{kind: {value}}}, with its settings beside `kind`"
            needed = [name for name, info in model.model_fields.items() if info.is_required()]
            if len(needed) == 1 and kinds == {model}:
                return f"write {{{needed[0]}: {value}}}"
        number = _number(value)
        if kinds & {int, float} and number is not None:
            return f"write {number:g}" + (" without quotes" if f"{number:g}" == value else "")
        if bool in kinds and value.lower() in ("yes", "no", "on", "off", "y", "n", "true", "false"):
            return f"write {str(value.lower() in ('yes', 'on', 'y', 'true')).lower()}"
        if any(outline(each) == "list" for each in alternatives(annotation)):
            return f"write [{value}]"
    if isinstance(value, float) and int in kinds:
        return f"write {int(value)}" if value == int(value) else "write a whole number"
    if (
        isinstance(value, bool | int | float)
        and str in kinds
        and not any(metadata(each) for each in alternatives(annotation))
    ):
        return "put it in quotes"
    return None


def _number(text: str) -> float | None:
    """The number that people mean by `1_000`, `1,000` or `10%`."""
    plain = re.sub(r"(?<=\d)[_,](?=\d{3})", "", text.strip())
    try:
        return float(plain[:-1]) / 100 if plain.endswith("%") else float(plain)
    except ValueError:
        return None


def _missing(spot: Spot) -> Problem:
    name, (around, model) = str(spot.loc[-1]), spot.models[-1]
    told = [tag for each in (model, *spot.siblings) if (tag := told_apart_by(each, spot)) is not None]
    if spot.siblings and name in told:
        return Problem(
            MISSING, around, f"one of {either([f'`{tag}`' for tag in told])} is missing", "say where it comes from"
        )
    info = model.model_fields[name]
    about = f" ({info.description.splitlines()[0].rstrip('.')})" if info.description else ""
    return Problem(
        MISSING, around, f"`{name}` is missing", f"add `{name}:` with {describe(annotation_of(info))}{about}"
    )


def _no_kind(spot: Spot, error: Any, value: Any) -> Problem:
    key = error["ctx"]["discriminator"].strip("'")
    kinds = listed([str(model.model_fields[key].default) for model in models_in(spot.expected)], limit=99)
    if error["type"] == "union_tag_not_found":
        return Problem(MISSING, spot.loc, f"`{key}` is missing", f"add `{key}:`, one of {kinds}")
    return Problem(VALUE, (*spot.loc, key), f"there is no {key} {shown(value[key])}", f"write one of {kinds}")


def _unknown_key(spot: Spot) -> Problem:
    name, model = str(spot.loc[-1]), spot.models[-1][1]
    unknown = f"unknown key `{name}`"
    for field, info in model.model_fields.items():
        if any(name in inner.model_fields for inner in models_in(info.annotation)):
            return Problem(
                SLIP, spot.loc, f"{unknown} here; did you mean `{field}.{name}`?", f"move it under `{field}`"
            )
    for outer, above in reversed(spot.models[:-1]):
        if name in above.model_fields:
            place = f"`{dotted(outer)}`" if outer else "the top of the recipe"
            return Problem(SLIP, spot.loc, f"{unknown} here; it is a setting of {place}", f"move it to {place}")
    owners = [each for each in spot.siblings if name in each.model_fields]
    if owners:
        mine, theirs = told_apart_by(model, spot), [told_apart_by(each, spot) or each.__name__ for each in owners]
        told = f"`{mine}` takes no `{name}`" + ("" if name in theirs else f"; {listed(theirs)} would")
        return Problem(SLIP, spot.loc, told, "remove it")
    if near := nearest(name, model.model_fields):
        fix = f"`{near[0]}` is given already: change it there, and remove `{name}`"
        return Problem(SLIP, spot.loc, f"{unknown}; did you mean `{near[0]}`?", fix)
    part_of = [field for field in model.model_fields if name in field.split("_") or f"_{name}" in field]
    hint = f"; did you mean `{part_of[0]}`?" if len(part_of) == 1 else ""
    return Problem(SLIP, spot.loc, unknown + hint, f"known here: {listed(list(model.model_fields), limit=99)}")


def told_apart_by(model: Model, spot: Spot) -> str | None:
    """What tells a class from its siblings: its `kind`, or the key that only it needs."""
    if "kind" in model.model_fields:
        return discriminator_tag(model, "kind")
    others = [each for each in (spot.models[-1][1], *spot.siblings) if each is not model]
    own = [
        n
        for n, info in model.model_fields.items()
        if info.is_required() and not any(n in o.model_fields for o in others)
    ]
    return own[0] if own else None
