"""`${env:NAME}` in a recipe: kept as written in every file and message, looked up only where the value is used."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from align.errors import LaunchError

_SECRET = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


def resolve_env(value: Any) -> Any:
    """A copy of plain values with every `${env:NAME}` replaced by the variable's value.

    Raises:
        LaunchError: A variable is not set.

    Example:
        >>> os.environ["ALIGN_DOCTEST"] = "reviews"
        >>> resolve_env({"path": "data/${env:ALIGN_DOCTEST}.jsonl", "limit": 3})
        {'path': 'data/reviews.jsonl', 'limit': 3}
    """
    if isinstance(value, str):
        return _SECRET.sub(_lookup, value)
    if isinstance(value, dict):
        return {key: resolve_env(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(resolve_env(each) for each in value)
    return value


def variables(value: Any) -> Iterator[str]:
    """Names of the variables that a text refers to."""
    if isinstance(value, str):
        yield from _SECRET.findall(value)


def is_malformed(value: Any) -> bool:
    """Whether a text starts a `${env:` that is none."""
    return isinstance(value, str) and "${env:" in _SECRET.sub("", value)


def _lookup(match: re.Match[str]) -> str:
    name = match[1]
    if name not in os.environ:
        raise LaunchError(f"the environment variable {name} is not set", fix=f"export {name}=... before the run")
    return os.environ[name]
