"""The scorers and functions that a stage names, found and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from align.errors import RecipeError
from align.scoring import Scorer, get_scorer, labels, load_function
from align.spec.job import Job
from align.spec.scored import REWARD, Scored, function_name


def columns_of(scorers: Mapping[str, Scorer]) -> dict[str, str]:
    """Name -> column in what is logged; the reward model's column is nobody else's."""
    return {name: name if label == REWARD else label for name, label in labels(scorers).items()}


def scorers_of(job: Job, settings: Scored) -> dict[str, Scorer]:
    """Scorers and functions by what they are called in `weights`.

    Raises:
        RecipeError: One cannot be loaded, or is a function that may not run.
        LaunchError: The package of a scorer cannot be imported.
    """
    found = {name: get_scorer(name) for name in settings.scorers}
    for spec in settings.functions:
        if spec not in job.code:
            raise RecipeError(f"{spec} may not run", where=f"stages.{job.stage}.functions", fix="add --allow-code")
        found[function_name(spec)] = load_function(spec, Path(job.folder), allowed=True, digest=job.code[spec])
    return found
