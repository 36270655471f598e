"""Scores by verifiable instructions: how many of those that a prompt gives does an answer follow?"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args, get_type_hints

from align.errors import DataError
from align.recipe.suggest import did_you_mean
from align.scoring.instructions import INSTRUCTIONS, Check
from align.scoring.language import LANGUAGES


class IFEval:
    """The share of its prompt's instructions that an answer follows, in [0, 1].

    The mean over answers lies near IFEval's strict accuracy by instruction, and weighs prompts alike, not instructions.
    The columns are those of IFEval's data: ``instruction_id_list``, and ``kwargs`` with the settings of each.
    """

    version: ClassVar[int] = 1
    label: ClassVar[str] = "followed"
    """Its column in results."""
    reads: ClassVar[tuple[str, ...]] = ("instruction_id_list", "kwargs")
    minimum: ClassVar[float] = 0.0
    maximum: ClassVar[float] = 1.0

    def score(self, prompt: str, completion: str, *, instruction_id_list: Any, kwargs: Any) -> float:
        """The share of the instructions that `completion` follows; an empty one follows none.

        Raises:
            DataError: An instruction is not known, or its settings are not what it needs.
        """
        checks = instructions_of(instruction_id_list, kwargs)
        if not completion.strip():
            return 0.0
        return sum(check(completion, **settings) for check, settings in checks) / len(checks)


def instructions_of(names: Any, settings: Any) -> list[tuple[Check, dict[str, Any]]]:
    """The checks of a row with their settings.

    Raises:
        DataError: See `IFEval.score`.
    """
    if not _is_list(names) or not _is_list(settings) or not names or len(names) != len(settings):
        raise _error(
            "`instruction_id_list` and `kwargs` are not two lists of the same length",
            "one or more names, and for each its settings ({} where it has none)",
        )
    return [_check(str(name), own) for name, own in zip(names, settings, strict=True)]


def _check(name: str, settings: Any) -> tuple[Check, dict[str, Any]]:
    if name not in INSTRUCTIONS:
        raise _error(
            f"no instruction is called `{name}`{did_you_mean(name, INSTRUCTIONS)}", f"one of: {', '.join(INSTRUCTIONS)}"
        )
    if not isinstance(settings, Mapping | None):
        raise _error(f"the settings of `{name}` are {settings!r}", "write a mapping, as {}")
    # Tables give every row every setting, and null where it has none.
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    check = INSTRUCTIONS[name]
    wanted = [key for key in inspect.signature(check).parameters if key != "text"]
    for key in given.keys() - set(wanted):
        raise _error(f"`{name}` has no setting `{key}`{did_you_mean(key, wanted)}", f"its settings: {wanted or 'none'}")
    kinds = get_type_hints(check)
    return check, {key: _setting(name, key, given.get(key), kinds[key]) for key in wanted}


def _setting(name: str, key: str, value: Any, kind: Any) -> Any:
    """A setting as its check wants it; a whole number may come as 3.0, as tables with nulls hold it."""
    options = sorted(LANGUAGES) if key == "language" else get_args(kind) if get_args(kind) != (str,) else ()
    if options:
        fits = value in options
    elif kind is int:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
        value = int(value) if fits else value
    elif kind is str:
        fits = isinstance(value, str) and bool(value)
    else:
        fits = _is_list(value) and bool(value) and all(isinstance(each, str) for each in value)
    if not fits:
        what = f"one of: {', '.join(options)}" if options else f"a value of type {getattr(kind, '__name__', kind)}"
        raise _error(f"the setting `{key}` of `{name}` is {value!r}", what)
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _error(message: str, fix: str) -> DataError:
    return DataError(message, where="scorers", fix=fix)
