"""What the comparisons of a run found, read from the files they left."""

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
    links, record = folder.links(), folder.read_record()
    ordered = [name for name in (record.stages if record else ()) if name in links]
    ordered += [name for name in links if name not in ordered]
    files = {name: links[name] / "results.json" for name in ordered}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


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
    """Print the table of every comparison of a run; nothing where there is none."""
    from align.report.table import results_table

    for results in run_results(folder).values():
        console.print(results_table(results))
