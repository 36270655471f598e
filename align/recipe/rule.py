"""A combination of settings that cannot work, as the tables of rules have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from align.recipe.graph import Node


@dataclass(frozen=True)
class Rule:
    """One combination.

    Attributes:
        id: Its name.
        fields: The settings that clash, as attributes of a `Node`; the first is where the error points.
        when: The values that clash, for a reader of the table.
        applies: Whether a stage has them.
        why: Why that cannot work.
        fix: What to do instead.
    """

    id: str
    fields: tuple[str, ...]
    when: str
    applies: Callable[[Node], bool]
    why: str
    fix: str
