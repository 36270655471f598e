"""Scorers by name: found through the entry point group `align.scorers`, so that any package can add one."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from align.errors import DataError, RecipeError, TrainingError
from align.recipe.sources import plugin, plugins
from align.recipe.suggest import did_you_mean

GROUP = "align.scorers"


@runtime_checkable
class Scorer(Protocol):
    """Says how good an answer is.

    An attribute ``label`` (str), where a scorer has one, names its column in results: the gold reward of a known world
    calls itself ``gold``. Without it the registered name is used.

    An attribute ``reads`` (tuple of str), where a scorer has one, names columns of the prompt's row that it needs
    beside the two texts: with ``reads = ("answer",)`` it is called ``score(prompt, completion, answer=...)``.
    """

    def score(self, prompt: str, completion: str) -> float:
        """A finite score, higher is better, of `completion` as an answer to the last user message `prompt`.

        Raises:
            DataError: A column that it reads holds something else; whoever calls it adds the row.
        """
        ...


def get_scorer(name: str) -> Scorer:
    """The scorer registered under `name`; a class is instantiated without arguments.

    Raises:
        RecipeError: No scorer has that name, or what has it cannot score.
        LaunchError: Its package cannot be imported.
    """
    registered = plugins(GROUP)
    if name not in registered:
        raise RecipeError(
            f"no scorer is called `{name}`{did_you_mean(name, registered)}",
            where="scorers",
            fix=f"one of: {', '.join(registered) or '(none is installed)'}; a package adds one through the entry point "
            f"group {GROUP}",
        )
    found = plugin(GROUP, name)
    scorer = found() if isinstance(found, type) else found
    if not isinstance(scorer, Scorer):
        raise RecipeError(
            f"scorer `{name}` ({registered[name].value}) has no method score(prompt, completion)",
            where="scorers",
            fix="register a class or an object that has one",
        )
    columns_read(name, scorer)
    return scorer


def columns_read(name: str, scorer: Scorer) -> tuple[str, ...]:
    """The columns of a prompt's row that a scorer needs.

    Raises:
        RecipeError: What it declares is not a tuple of names.
    """
    reads = getattr(scorer, "reads", ())
    # A lone string would pass for the columns that its letters name.
    if not isinstance(reads, tuple) or not all(isinstance(column, str) for column in reads):
        raise RecipeError(
            f"scorer `{name}` declares reads = {reads!r}",
            where="scorers",
            fix='a tuple of column names, as reads = ("answer",)',
        )
    return reads


def score_label(name: str, scorer: Scorer) -> str:
    """The name of a scorer's column in results."""
    return str(getattr(scorer, "label", name))


def labels(scorers: Mapping[str, Scorer]) -> dict[str, str]:
    """Name -> label; a label that two of them claim gives way to their names."""
    claimed = {name: score_label(name, scorer) for name, scorer in scorers.items()}
    twice = {label for label in claimed.values() if list(claimed.values()).count(label) > 1}
    return {name: name if label in twice else label for name, label in claimed.items()}


def score_completion(
    name: str, scorer: Scorer, prompt: str, completion: str, fields: Mapping[str, Any], row: int
) -> float:
    """The score of one completion: every stage asks for it here.

    Args:
        name: What the scorer is called in messages.
        scorer: It.
        prompt: The last user message.
        completion: The answer.
        fields: The columns of the prompt's row.
        row: Number of that row.

    Raises:
        DataError: The row lacks a column that the scorer reads, or the scorer cannot use what is in it.
        TrainingError: What it returned is no score.
    """
    given = {column: _field(name, column, fields, row) for column in columns_read(name, scorer)}
    call: Callable[..., Any] = scorer.score
    try:
        score = call(prompt, completion, **given)
    except DataError as error:
        raise DataError(f"{error.message} (row {row})", where=error.where, fix=error.fix) from error
    if isinstance(score, bool) or not isinstance(score, numbers.Real) or not math.isfinite(score):
        raise TrainingError(
            f"scorer `{name}` returned {score!r} for the prompt in row {row}",
            where="scorers",
            fix="a score is a finite number, higher is better: mend the scorer, or leave it out of `scorers`",
        )
    return float(score)


def _field(name: str, column: str, fields: Mapping[str, Any], row: int) -> Any:
    value = fields.get(column)
    if value is None:
        lack = "is null" if column in fields else "is not there"
        raise DataError(
            f"scorer `{name}` reads the column `{column}`, which {lack} in row {row}"
            + ("" if column in fields else did_you_mean(column, fields)),
            where="scorers",
            fix=f"give every prompt a value of `{column}`, or leave the scorer out of `scorers`",
        )
    return value
