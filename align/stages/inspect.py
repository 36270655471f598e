"""Looks at data as the stages of a recipe read it, in a process that may load tokenizers.

`python -m align.stages.inspect VIEW JOB.json... [--data NAME] [--rows N]`, where VIEW is `preview` (records), `mask`
(which tokens are trained), `check` (what became of the rows) or `count`: one JSON object, stage -> `data` and `report`,
or `data` and `known_after` where a stage that has not run makes the tokenizer or the records.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from transformers import PreTrainedTokenizerBase

from align.artifacts.store import Store
from align.data import DataReport, Example, load_examples, load_prompts
from align.data.candidates import load_candidates, load_conversations
from align.data.check import first_examples, shared_prompts
from align.data.preview import preview_masks, preview_records, report_tables
from align.errors import AlignError, LaunchError, RecipeError
from align.methods import get_method
from align.methods.pretrain import Pretrain
from align.models.platform import prepare_process
from align.models.policies import load_policy_tokenizer
from align.models.tokenizer import load_tokenizer
from align.recipe.made import records_file
from align.recipe.schema import stage_kinds
from align.spec.job import Job
from align.spec.online import RolloutStage
from align.spec.sample import SampleStage
from align.spec.score import ScoreStage
from align.spec.select import SelectStage
from align.spec.stages import CompareStage, TrainedStage
from align.stages import start
from align.types import Batch

ANY_LENGTH = 10**9
"""For prompts that are only answered: how long they may be is known once their models are."""


class Reader:
    """The data of one stage, as that stage reads it."""

    def __init__(self, job: Job) -> None:
        self.job, self.folder, self.store = job, Path(job.folder), Store(Path(job.home))
        self.settings = stage_kinds()[job.kind].model_validate(job.settings)

    def unmade(self, data: str) -> bool:
        """Whether these are records that a stage has yet to make."""
        fingerprint, source = self.job.inputs.get(data), self.job.data[data]
        if fingerprint is None or getattr(source, "path", None) != str(records_file(fingerprint, self.store.home)):
            return False
        return self.store.find(fingerprint) is None

    def known_after(self, data: str) -> str | None:
        """The stage that has to run before an entry is counted in tokens: it makes the records, or the tokenizer."""
        return data if self.unmade(data) else self._tokenizer_after

    def expect(self, data: str) -> None:
        """Refuse records that are not there yet.

        Raises:
            LaunchError: Naming the stage that makes them.
        """
        if self.unmade(data):
            raise LaunchError(
                f"the records are made by stage `{data}`, which has not run yet",
                where=f"stage {self.job.stage}: data {data}",
                fix=f"align run RECIPE --until {data}",
            )

    @property
    def _speaker(self) -> str:
        """The stage whose tokenizer reads the data."""
        if isinstance(self.settings, CompareStage):
            return self.settings.baseline
        return self.settings.policies[0] if isinstance(self.settings, SampleStage) else self.job.stage

    @property
    def _tokenizer_after(self) -> str | None:
        """The stage that makes the tokenizer, if it has not run yet."""
        name = self.job.model.base if self.job.model is not None else self._speaker
        fingerprint = self._fingerprint(name)
        return name if fingerprint is not None and self.store.find(fingerprint) is None else None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if (name := self._tokenizer_after) is not None:
            raise LaunchError(
                f"the tokenizer is made by stage `{name}`, which has not run yet",
                where=f"stage {self.job.stage}",
                fix=f"align run RECIPE --until {name}",
            )
        if self.job.model is not None:
            origin = start.of_model(self.job, self.job.model, self.store)
            return load_tokenizer(origin.base, origin.revision)
        fingerprint = self._fingerprint(self._speaker)
        assert fingerprint is not None
        return load_policy_tokenizer(self.store, fingerprint)

    def _fingerprint(self, stage: str) -> str | None:
        return self.job.fingerprint if stage == self.job.stage else self.job.inputs.get(stage)

    @property
    def _training(self) -> dict[str, Any]:
        """How a stage that trains wants its data."""
        assert isinstance(self.settings, TrainedStage)
        pretrain = isinstance(self.settings, Pretrain)
        # A stage on rollouts is trained on its own completions, and on texts that it may mix in.
        batch = Batch.TOKENS if isinstance(self.settings, RolloutStage) else get_method(self.job.kind).batch
        return {
            "batch": batch,
            "tokenizer": self.tokenizer,
            "max_tokens": self.settings.train.max_tokens,
            "loss_on": "all" if pretrain else getattr(self.settings, "loss_on", "completion"),
            "target": getattr(self.settings, "target", None) == "column",
            "folder": self.folder,
        }

    def report(self, name: str) -> DataReport:
        """What becomes of the rows of an entry."""
        source = self.job.data[name]
        if isinstance(self.settings, RolloutStage) and name == self.settings.prompts:
            from align.stages.online import read_prompts  # it imports what trains, which nothing else here does

            return read_prompts(self.job, self.settings, self.tokenizer, None, None)[1]
        if isinstance(self.settings, TrainedStage):
            return load_examples(source, **self._training)[1]
        if isinstance(self.settings, ScoreStage | SelectStage):
            whole = isinstance(self.settings, SelectStage) and name == self.settings.include
            return (load_conversations if whole else load_candidates)(source, folder=self.folder)[1]
        return load_prompts(source, tokenizer=self.tokenizer, max_tokens=ANY_LENGTH, folder=self.folder)[1]

    def examples(self, name: str, rows: int) -> list[Example]:
        """The first examples of an entry.

        Raises:
            RecipeError: The stage trains nothing.
        """
        asked = isinstance(self.settings, RolloutStage) and name == self.settings.prompts
        if asked or not isinstance(self.settings, TrainedStage):
            raise RecipeError(
                "nothing is trained on these records",
                where=f"stage {self.job.stage}: data {name}",
                fix=f"align data preview RECIPE {name}",
            )
        return first_examples(self.job.data[name], rows, **self._training)


def count(job: Job) -> dict[str, Any]:
    """What a training stage makes of its data."""
    reader = Reader(job)
    settings = reader.settings
    name: str = settings.prompts if isinstance(settings, RolloutStage) else settings.data  # type: ignore[attr-defined]
    if (after := reader.known_after(name)) is not None:
        return {"data": name, "known_after": after}
    return {"data": name, "report": reader.report(name).model_dump(mode="json")}


def view(what: str, job: Job, name: str, rows: int) -> RenderableType:
    """One entry of `data` for a terminal."""
    reader = Reader(job)
    reader.expect(name)
    if what == "preview":
        return preview_records(job.data[name], reader.folder, rows)
    if what == "mask":
        return preview_masks(job.data[name], reader.examples(name, rows), reader.tokenizer)
    others = {other: source for other, source in job.data.items() if other != name and not reader.unmade(other)}
    return report_tables(name, reader.report(name), shared_prompts(job.data[name], others, reader.folder))


def main(arguments: list[str]) -> int:
    """Show one view; the exit code."""
    parser = argparse.ArgumentParser("align.stages.inspect")
    parser.add_argument("view", choices=("count", "preview", "mask", "check"))
    parser.add_argument("jobs", nargs="+", type=Path)
    parser.add_argument("--data", default="")
    parser.add_argument("--rows", type=int, default=3)
    given = parser.parse_args(arguments)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of the answer
            prepare_process()
            jobs = [Job.model_validate_json(path.read_text()) for path in given.jobs]
            if given.view == "count":
                answer: RenderableType = json.dumps({job.stage: count(job) for job in jobs})
            else:
                answer = view(given.view, jobs[0], given.data, given.rows)
    except AlignError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    if isinstance(answer, str):
        print(answer)  # noqa: T201
    else:
        wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
        Console(width=wide).print(answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
