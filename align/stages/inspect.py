"""Counts what the stages of a recipe make of their data: `python -m align.stages.inspect JOB.json...`.

It prints one JSON object: stage -> `{"data", "report"}`, or `{"data", "known_after"}` where the tokenizer is the work
of a stage that has not run yet.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from align.artifacts.store import Store
from align.data import load_examples
from align.errors import AlignError
from align.methods import get_method
from align.models.platform import prepare_process
from align.models.tokenizer import load_tokenizer
from align.recipe.schema import stage_kinds
from align.spec.job import Job
from align.spec.stages import PolicyStage
from align.stages import start


def inspect(job: Job) -> dict[str, Any]:
    """What one training stage makes of its data."""
    settings = stage_kinds()[job.kind].model_validate(job.settings)
    name: str = settings.data  # type: ignore[attr-defined]
    if not isinstance(settings, PolicyStage) or job.model is None:
        return {"data": name, "known_after": job.stage}
    store, base = Store(Path(job.home)), job.model.base
    if base in job.inputs and store.find(job.inputs[base]) is None:
        return {"data": name, "known_after": base}
    origin = start.of_model(job, job.model, store)
    _, report = load_examples(
        job.data[name],
        batch=get_method(job.kind).batch,
        tokenizer=load_tokenizer(origin.base, origin.revision),
        max_tokens=settings.train.max_tokens,
        loss_on=getattr(settings, "loss_on", "completion"),
        folder=Path(job.folder),
    )
    return {"data": name, "report": report.model_dump(mode="json")}


def main(paths: list[str]) -> int:
    """Inspect every job; the exit code."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of the answer
            prepare_process()
            jobs = [Job.model_validate_json(Path(path).read_text()) for path in paths]
            answer = {job.stage: inspect(job) for job in jobs}
    except AlignError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    print(json.dumps(answer))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
