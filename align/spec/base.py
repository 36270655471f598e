"""What all settings share: strictness, the cosmetic mark, and the typed references between stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of every settings class: unknown keys are errors, values are checked when they are assigned."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


def cosmetic(default: Any = ..., **constraints: Any) -> Any:
    """A field that cannot change what a stage produces, so it is left out of the fingerprint."""
    return Field(default, json_schema_extra={"cosmetic": True}, **constraints)


def unordered(default: Any = ..., **constraints: Any) -> Any:
    """A list whose order means nothing, so that the fingerprint does not depend on it."""
    return Field(default, json_schema_extra={"unordered": True}, **constraints)


@dataclass(frozen=True)
class StageRef:
    """Marks a field that names another stage, and what that stage must produce."""

    produces: str


@dataclass(frozen=True)
class DataRef:
    """Marks a field that names an entry of `data`, and the kinds of records it may hold."""

    records: tuple[str, ...]


@dataclass(frozen=True)
class Registered:
    """Marks a field that names a plug-in: something registered in this entry point group."""

    group: str


class HubAdapter(Settings):
    """An adapter that was made elsewhere."""

    adapter: str
    """Folder or Hub name of a PEFT adapter of the model's base."""


PolicyRef = Annotated[str, StageRef("policy")]
"""The name of a stage that produces a policy."""

Produces = Literal["policy", "comparison"]
"""What a stage may produce."""
