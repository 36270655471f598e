"""What the comparisons of a run found, and how good its reward models are, read from the files they left."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from align.artifacts.seal import write_atomic
from align.errors import ArtifactError, RecipeError
from align.runner.folder import RunFolder

Results = dict[str, Any]


def run_results(folder: RunFolder) -> dict[str, Results]:
    """Content of `results.json` of every comparison of a run folder, by stage, in the order of the recipe."""
    return _contents(folder, "results.json")


def run_evaluations(folder: RunFolder) -> dict[str, Results]:
    """Content of `evaluation.json` of every reward model of a run folder, by stage, in the order of the recipe."""
    return _contents(folder, "evaluation.json")


def _contents(folder: RunFolder, name: str) -> dict[str, Results]:
    links, record = folder.links(), folder.read_record()
    ordered = [stage for stage in (record.stages if record else ()) if stage in links]
    ordered += [stage for stage in links if stage not in ordered]
    files = {stage: links[stage] / name for stage in ordered}
    return {stage: json.loads(file.read_text()) for stage, file in files.items() if file.is_file()}


def one_comparison(folder: RunFolder, stage: str | None = None) -> Results:
    """The results of one comparison of a run.

    Args:
        folder: The run folder.
        stage: Which comparison; may be left out where there is one only.

    Raises:
        ArtifactError: The run has no comparison yet.
        RecipeError: No comparison of that name, or several and none named.
    """
    found = run_results(folder)
    if not found:
        raise ArtifactError(
            "no comparison has finished here",
            where=str(folder.path),
            fix="run a recipe that has a stage of kind compare: align run RECIPE",
        )
    if stage is None and len(found) == 1:
        return next(iter(found.values()))
    if stage is None or stage not in found:
        what = f"no finished comparison is called {stage!r}" if stage else "the run has several comparisons"
        raise RecipeError(what, where="--stage", fix=f"one of: {', '.join(found)}")
    return found[stage]


def keep_results(folder: RunFolder) -> None:
    """Keep the results of the last comparison as `results.json` of the run folder."""
    found = list(run_results(folder).values())
    if found:
        write_atomic(folder.results, json.dumps(found[-1], indent=1, ensure_ascii=False))
    else:
        folder.results.unlink(missing_ok=True)


def show_results(folder: RunFolder, console: Console) -> None:
    """Print what every reward model and every comparison of a run found; nothing where there is none."""
    from align.report.table import results_table, rewards_table

    if evaluations := run_evaluations(folder):
        console.print(rewards_table(evaluations))
    for results in run_results(folder).values():
        console.print(results_table(results))
