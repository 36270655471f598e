"""The typed references in a settings object: which stages, data entries and plug-ins it names, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from align.recipe.origins import Loc
from align.recipe.shape import alternatives, annotation_of, metadata, strip
from align.spec.base import CodeRef, DataRef, Registered, Settings, StageRef

Mark = StageRef | DataRef | Registered | CodeRef


@dataclass(frozen=True)
class Reference:
    """A name at `loc` (inside the settings object) and what its field says it refers to."""

    loc: Loc
    name: str
    mark: Mark


def references(settings: Settings) -> Iterator[Reference]:
    """Every reference in a settings object, in the order of its fields."""
    for name, info in type(settings).model_fields.items():
        yield from _walk(getattr(settings, name), annotation_of(info), (name,))


def mark_of(value: Any, annotation: Any) -> Mark | None:
    """What a text in a field of this type refers to, if anything."""
    if not isinstance(value, str):
        return None
    marks = (mark for each in alternatives(annotation) for mark in metadata(each))
    return next((mark for mark in marks if isinstance(mark, Mark)), None)


def item_annotation(annotation: Any, kind: type) -> Any:
    """The type of the items (or values) of the list (or dict) among the alternatives."""
    for each in alternatives(annotation):
        if getattr(strip(each), "__origin__", None) is kind:
            return get_args(strip(each))[-1]
    return Any


def _walk(value: Any, annotation: Any, loc: Loc) -> Iterator[Reference]:
    if isinstance(value, Settings):
        for reference in references(value):
            yield Reference(loc + reference.loc, reference.name, reference.mark)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _walk(item, item_annotation(annotation, list), (*loc, i))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, item_annotation(annotation, dict), (*loc, key))
    elif (mark := mark_of(value, annotation)) is not None:
        yield Reference(loc, value, mark)
