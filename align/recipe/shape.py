"""Where a pydantic error points in a recipe, and what was expected there, without pydantic's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo

from align.recipe.origins import Loc
from align.spec.base import DataRef, StageRef

Model = type[BaseModel]


@dataclass
class Spot:
    """A place in a recipe as its schema sees it.

    Attributes:
        loc: Keys and positions, without the tags that pydantic adds for the members of unions.
        expected: The annotation of the value that stands there; None if there is none.
        models: The settings classes around the place, outermost first; the last one has (or lacks) the key ``loc[-1]``.
        siblings: The other classes that could stand where ``models[-1]`` stands.
        choices: Plain unions passed on the way: their place, annotation, and the member the error is about.
    """

    loc: Loc
    expected: Any
    models: list[tuple[Loc, Model]] = field(default_factory=list)
    siblings: list[Model] = field(default_factory=list)
    choices: list[tuple[Loc, Any, Any]] = field(default_factory=list)


def locate(root: Model, loc: Loc) -> Spot:
    """Follow an error's location through the annotations, leaving out the tags of unions."""
    spot = Spot((), root)
    for item in loc:
        members = alternatives(spot.expected)
        if len(members) > 1:
            member, plain = _member(members, item)
            if plain:
                spot.choices.append((spot.loc, spot.expected, member))
            spot.siblings = [m for each in members if is_model(m := strip(each)) and m is not strip(member)]
            spot.expected = member
            continue
        kind: Any = strip(members[0])
        if is_model(kind):
            spot.models.append((spot.loc, kind))
            spot.expected = annotation_of(kind.model_fields[item]) if item in kind.model_fields else None
        else:
            arguments = get_args(kind)
            spot.expected = arguments[-1] if get_origin(kind) in (list, dict, tuple) and arguments else None
        spot.loc = (*spot.loc, item)
    return spot


def annotation_of(info: FieldInfo) -> Any:
    """A field's annotation together with the metadata that pydantic took off it."""
    return Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation


def strip(annotation: Any) -> Any:
    """The annotation without `Annotated`."""
    return strip(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def metadata(annotation: Any) -> tuple[Any, ...]:
    """What `Annotated` adds, all levels together."""
    if get_origin(annotation) is not Annotated:
        return ()
    inner, *added = get_args(annotation)
    return (*metadata(inner), *added)


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union but None; the annotation itself if it is no union."""
    if get_origin(strip(annotation)) not in (Union, UnionType):
        return [annotation]
    return [
        each for member in get_args(strip(annotation)) if strip(member) is not NoneType for each in alternatives(member)
    ]


def is_model(annotation: Any) -> bool:
    """Whether it is a settings class."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def models_in(annotation: Any) -> list[Model]:
    """The settings classes among the alternatives."""
    return [strip(each) for each in alternatives(annotation) if is_model(strip(each))]


def discriminator_tag(model: Model, key: str) -> str | None:
    """The one value that the class allows for `key`, where it is a `Literal` of one."""
    info = model.model_fields.get(key)
    values = get_args(info.annotation) if info is not None and get_origin(info.annotation) is Literal else ()
    return str(values[0]) if len(values) == 1 else None


def _member(members: list[Any], tag: str | int) -> tuple[Any, bool]:
    """The member of a union that a tag stands for, and whether the union is a plain one (no discriminator)."""
    for member in members:
        model = strip(member)
        if any(isinstance(each, Tag) and each.tag == tag for each in metadata(member)):
            return member, False
        if is_model(model) and any(discriminator_tag(model, key) == tag for key in model.model_fields):
            return member, False
    return next((member for member in members if _label(member, str(tag))), None), True


def _label(member: Any, tag: str) -> bool:
    kind = strip(member)
    origin = get_origin(kind)
    if origin is Literal:
        return tag.startswith("literal[")
    if origin is not None:
        return tag.startswith(f"{getattr(origin, '__name__', '')}[")
    return getattr(kind, "__name__", "") == tag or tag.startswith("constrained-" + getattr(kind, "__name__", "?"))


def outline(annotation: Any) -> str:
    """`dict`, `list` or `scalar`: the outer form of values of this type."""
    kind = strip(annotation)
    if is_model(kind) or get_origin(kind) is dict or kind is dict:
        return "dict"
    return "list" if get_origin(kind) in (list, tuple) or kind in (list, tuple) else "scalar"


def options(annotation: Any) -> list[Any]:
    """The values of the `Literal`s among the alternatives."""
    return [
        value
        for each in alternatives(annotation)
        if get_origin(strip(each)) is Literal
        for value in get_args(strip(each))
    ]


def describe(annotation: Any, keys: bool = True) -> str:
    """What is expected, in words; with the keys of a mapping, where it is one class and `keys` is true.

    Example:
        >>> describe(int | None), describe(Literal["a", "b"]), describe(list[str] | Literal["all"])
        ('a whole number', '`a` or `b`', 'a list or `all`')
    """
    parts = []
    for each in alternatives(annotation):
        kind = strip(each)
        if get_origin(kind) is Literal:
            parts += [f"`{value}`" for value in get_args(kind)]
        elif is_model(kind):
            one = keys and len(models_in(annotation)) == 1
            parts.append("a mapping" + (f" with {listed(list(kind.model_fields))}" if one else ""))
        elif any(isinstance(mark, StageRef) for mark in metadata(each)):
            parts.append("the name of a stage")
        elif any(isinstance(mark, DataRef) for mark in metadata(each)):
            parts.append("the name of an entry of `data`")
        else:
            plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            parts.append(plain.get(kind) or {"list": "a list", "dict": "a mapping"}.get(outline(each), "another value"))
    return either(list(dict.fromkeys(parts)))


def either(parts: list[str]) -> str:
    """``a, b or c``."""
    return " or ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def listed(names: list[str], limit: int = 12) -> str:
    """Names as code, the first `limit` of them."""
    text = ", ".join(f"`{name}`" for name in names[:limit])
    return text + (", ..." if len(names) > limit else "")
