"""What all settings share: strictness, the cosmetic mark, what nothing reads, and the references between stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Unread:
    """A setting that has no effect beside certain others: writing it is an error, for its author expects an effect.

    Attributes:
        field: The setting.
        when: Whether the settings object it belongs to makes it so.
        why: The reason.
        fix: What to do.
    """

    field: str
    when: Callable[[Any], bool]
    why: str
    fix: str


class Settings(BaseModel):
    """Base of every settings class: unknown keys are errors, values are checked when they are assigned."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)

    unread: ClassVar[tuple[Unread, ...]] = ()
    """What nothing reads in some cases; those of the base classes hold too."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a declaration about a field that the class does not have: it would never be told.

        Raises:
            TypeError: There is no such field.
        """
        for each in vars(cls).get("unread", ()):
            if each.field not in cls.model_fields:
                raise TypeError(f"{cls.__name__}.unread names `{each.field}`, which is no field of it")


def cosmetic(default: Any = ..., **constraints: Any) -> Any:
    """A field that cannot change what a stage produces, so it is left out of the fingerprint."""
    return Field(default, json_schema_extra={"cosmetic": True}, **constraints)


def added(default: Any) -> Any:
    """A field that came later: at its default it is left out of the fingerprint, so that older results are found."""
    return Field(default, json_schema_extra={"added": True})


def unordered(default: Any = ..., **constraints: Any) -> Any:
    """A list whose order means nothing, so that the fingerprint does not depend on it."""
    return Field(default, json_schema_extra={"unordered": True}, **constraints)


@dataclass(frozen=True)
class StageRef:
    """Marks a field that names another stage, and what that stage must produce."""

    produces: str


@dataclass(frozen=True)
class DataRef:
    """Marks a field that names an entry of `data`, or a stage that makes records.

    Attributes:
        records: The kinds of records it may hold.
        without: Formats that hold such records and cannot be read there all the same.
    """

    records: tuple[str, ...]
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Registered:
    """Marks a field that names a plug-in: something registered in this entry point group."""

    group: str


@dataclass(frozen=True)
class CodeRef:
    """Marks a field that names a function in a Python file of the user's: `file.py:function`."""


class HubAdapter(Settings):
    """An adapter that was made elsewhere."""

    adapter: str
    """Folder or Hub name of a PEFT adapter of the model's base."""
    revision: str | None = None
    """Hub revision; resolved to a commit before it is used."""


PolicyRef = Annotated[str, StageRef("policy")]
"""The name of a stage that produces a policy."""

Produces = Literal["policy", "reward", "records", "comparison"]
"""What a stage may produce."""
