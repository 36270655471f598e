"""Where models come from: a folder or the Hub, and what to say when neither has one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.errors import LaunchError, RecipeError


@contextmanager
def reading(source: str | Path, what: str, where: str = "model.base") -> Iterator[None]:
    """Turn what transformers raises for a missing or unreadable `what` into an error with a fix.

    Raises:
        RecipeError: If `source` is a folder and holds no such thing, or looks like a folder and is none.
        LaunchError: If `source` is a Hub name that cannot be read from here.
    """
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(source).is_dir():
            raise RecipeError(
                f"no {what} can be read from {source}: {reason}",
                where=where,
                fix="give a folder written by save_pretrained, with its weights as .safetensors",
            ) from error
        if Path(source).is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
            raise RecipeError(f"there is no folder {source}", where=where, fix="check the path") from error
        raise LaunchError(
            f"no {what} {source!r} on the Hub or in its cache: {reason}",
            where=where,
            fix="check the name and the connection, or download it first and give the folder",
        ) from error
