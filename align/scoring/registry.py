"""Scorers by name: found through the entry point group `align.scorers`, so that any package can add one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from align.errors import RecipeError
from align.recipe.sources import plugin, plugins
from align.recipe.suggest import did_you_mean

GROUP = "align.scorers"


@runtime_checkable
class Scorer(Protocol):
    """Says how good an answer is.

    An attribute ``label`` (str), where a scorer has one, names its column in results: the gold reward of a known world
    calls itself ``gold``. Without it the registered name is used.
    """

    def score(self, prompt: str, completion: str) -> float:
        """A finite score, higher is better, of `completion` as an answer to the last user message `prompt`."""
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
    return scorer


def score_label(name: str, scorer: Scorer) -> str:
    """The name of a scorer's column in results."""
    return str(getattr(scorer, "label", name))
