"""Scorers by name: found through the entry point group `align.scorers`, so that any package can add one."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol, runtime_checkable

from align.errors import LaunchError, RecipeError

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
    entry = _entry(name)
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise LaunchError(
            f"scorer {name!r} ({entry.value}) cannot be imported: {error}",
            where="scorers",
            fix="install what it needs, or reinstall the package that registers it",
        ) from error
    scorer = found() if isinstance(found, type) else found
    if not isinstance(scorer, Scorer):
        raise RecipeError(
            f"scorer {name!r} ({entry.value}) has no method score(prompt, completion)",
            where="scorers",
            fix="register a class or an object that has one",
        )
    return scorer


def score_label(name: str, scorer: Scorer) -> str:
    """The name of a scorer's column in results."""
    return str(getattr(scorer, "label", name))


def _entry(name: str) -> EntryPoint:
    registered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in registered:
        close = get_close_matches(name, registered, n=1)
        raise RecipeError(
            f"no scorer is called {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
            where="scorers",
            fix=f"one of: {', '.join(sorted(registered)) or '(none is installed)'}; a package adds one through the "
            f"entry point group {GROUP}",
        )
    return registered[name]
