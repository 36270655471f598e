"""Every error a user can cause, with the exit code it ends the process with.

An `AlignError` is told in plain words without a traceback: what is wrong, where, and how to mend it. Anything else that
escapes is a bug of align and keeps its traceback.
"""

from __future__ import annotations

from typing import Any, ClassVar

EXIT_DONE = 0
EXIT_PREEMPTED = 75


class AlignError(Exception):
    """Base of all errors that are told to the user.

    Args:
        message: What is wrong, naming the value.
        where: The place: ``file:line`` and/or the YAML path (``stages.dpo.beta``).
        fix: What to do about it, in the imperative.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  fix: {self.fix}" if self.fix else text

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.where, self.fix)


def _rebuild(kind: type[AlignError], message: str, where: str | None, fix: str | None) -> AlignError:
    """Keyword arguments do not survive `Exception`'s own pickling; errors cross process borders here."""
    return kind(message, where=where, fix=fix)


class TrainingError(AlignError):
    """A stage failed while running: a non-finite number, a broken invariant."""

    exit_code = 1


class ArtifactError(AlignError):
    """A stored artifact is missing, damaged or not what it claims to be."""

    exit_code = 1


class RecipeError(AlignError):
    """The recipe is wrong; found before anything runs."""

    exit_code = 2


class DataError(AlignError):
    """The data is wrong: unreadable, or too many bad rows."""

    exit_code = 3


class LaunchError(AlignError):
    """The environment cannot do what was asked: a missing package, device, port or lock."""

    exit_code = 4
