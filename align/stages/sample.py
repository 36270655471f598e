"""Executes `sample`: policies answer prompts, and what they say is kept with where it comes from.

Draws belong to a seed, a policy and the words of a prompt, so that neither the batch size nor the number of processes,
other prompts or a restart change them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from align.artifacts.chunks import Chunks
from align.artifacts.store import Store
from align.data import DataReport, PromptExample, load_prompts
from align.data.records import digest
from align.errors import DataError, RecipeError
from align.models.policies import load_policies, load_policy_tokenizer, locate, positions_of_policy
from align.rollout import Sampled, get_engine, keyed_draws
from align.rollout.beam import beam
from align.spec.job import Job
from align.spec.sample import SampleStage
from align.stages.memory import free_memory
from align.stages.publish import publish_records, quarantine_of
from align.stages.rounds import finished, in_rounds
from align.training import collectives
from align.training.distributed import process_group
from align.training.guards import StopRequest

ROUND_BATCHES = 4
"""Batches of completions that one process draws before it keeps them."""
ANY_LENGTH = 2**20

Answers = list[dict[str, Any]]
"""The completions of one policy for one prompt: `text`, `tokens`, `logp` and `ended` of each."""


@dataclass(frozen=True)
class Asked:
    """Prompts as one policy reads them.

    Attributes:
        tokenizer: The policy's.
        prompts: Those that every policy has room for, in the same order.
    """

    tokenizer: Any
    prompts: list[PromptExample]


def run(job: Job, settings: SampleStage, store: Store, report: Any) -> None:
    """Let the policies answer and put what they say into the store.

    Args:
        job: The resolved stage.
        settings: Its settings, parsed.
        store: Where the policies are read and the artifact is added.
        report: The worker's reporter.

    Raises:
        RecipeError: Prompts and answers do not fit into a model.
        DataError: The prompts cannot be read, or there is none that every policy has room for.
        Preempted: A signal asked for a stop; what is finished is kept.
    """
    began = time.monotonic()
    with process_group(deepspeed=False):
        stop = StopRequest()
        try:
            report(0, 0, "reading prompts")
            asked, data_report = _read(job, settings, store)
            chunks = Chunks(Path(job.work))
            _draw(job, settings, store, asked, chunks, stop, report)
            if collectives.rank() == 0:
                answers = chunks.read()
                publish_records(
                    job,
                    store,
                    _rows(settings, asked, answers),
                    reports={settings.prompts: data_report},
                    metrics=_metrics(settings, asked, answers),
                    seed=settings.generation.seed,
                    seconds=time.monotonic() - began,
                )
                chunks.drop()
            collectives.barrier()
        finally:
            stop.close()


def _read(job: Job, settings: SampleStage, store: Store) -> tuple[dict[str, Asked], DataReport]:
    """The prompts by policy, and what became of the rows; where policies differ, for the one with the least room."""
    asked: dict[str, Asked] = {}
    reports = []
    for name in settings.policies:
        tokenizer = load_policy_tokenizer(store, job.inputs[name])
        prompts, report = load_prompts(
            job.data[settings.prompts],
            tokenizer=tokenizer,
            max_tokens=_room(job, settings, store, name),
            folder=Path(job.folder),
            quarantine=quarantine_of(job) if collectives.rank() == 0 else None,
        )
        asked[name] = Asked(tokenizer, prompts)
        reports.append(report)
    shared = set.intersection(*({prompt.row for prompt in own.prompts} for own in asked.values()))
    if not shared:
        raise DataError("there is no prompt that every policy has room for", fix="lower generation.max_new_tokens")
    kept = {
        name: Asked(own.tokenizer, [prompt for prompt in own.prompts if prompt.row in shared])
        for name, own in asked.items()
    }
    return kept, min(reports, key=lambda report: report.examples)


def _room(job: Job, settings: SampleStage, store: Store, name: str) -> int:
    """Longest prompt that leaves room for an answer in a policy's positions."""
    positions = positions_of_policy(store, job.inputs[name]) or ANY_LENGTH
    new = settings.generation.max_new_tokens
    if positions <= new:
        raise RecipeError(
            f"{new} new tokens leave no room for a prompt in the {positions} positions of `{name}`",
            where=f"stages.{job.stage}.generation.max_new_tokens",
            fix=f"set it well below {positions}",
        )
    return positions - new


def _draw(
    job: Job,
    settings: SampleStage,
    store: Store,
    asked: Mapping[str, Asked],
    chunks: Chunks,
    stop: StopRequest,
    report: Any,
) -> None:
    """Draw what is not there yet. Policies on one base are loaded together, those on another after them."""
    there = finished(chunks)
    total, done = sum(len(own.prompts) for own in asked.values()), len(there)
    report.resumed_from_step = done
    # Several completions of a prompt are drawn side by side.
    size = max(1, ROUND_BATCHES * settings.generation.batch_size // settings.completions)
    for names in _by_base(job, settings, store):
        todo = {name: sum(_key(name, p) not in there for p in asked[name].prompts) for name in names}
        if not any(todo.values()):
            continue
        report(done, total, f"loading {', '.join(names)}")
        models = load_policies(store, {name: job.inputs[name] for name in names})
        for name in names:
            teller = _Teller(report, done, total, name)
            drawer = _Drawer(models[name], name, asked[name].tokenizer, settings)
            key = partial(_key, name)
            in_rounds(asked[name].prompts, size, drawer, key=key, there=there, chunks=chunks, stop=stop, tell=teller)
            done += todo[name]
        del models, drawer
        free_memory()


def _by_base(job: Job, settings: SampleStage, store: Store) -> Iterator[list[str]]:
    """The policies, those that share a base together."""
    bases = {}
    for name in settings.policies:
        source = locate(store, job.inputs[name])
        bases[name] = (source.base, source.revision or "", source.model.quantization, source.model.dtype)
    for _, names in groupby(sorted(settings.policies, key=bases.__getitem__), key=bases.__getitem__):
        yield list(names)


@dataclass(frozen=True)
class _Teller:
    """Tells how many prompts have been answered, of those of all policies."""

    report: Any
    before: int
    total: int
    name: str

    def __call__(self, done: int) -> None:
        self.report(self.before + done, self.total, f"{self.name} answers")


@dataclass(frozen=True)
class _Drawer:
    """Draws the answers of one policy to some prompts."""

    roles: Any
    name: str
    tokenizer: Any
    settings: SampleStage

    def __call__(self, prompts: Sequence[PromptExample]) -> dict[str, Answers]:
        found = self._sampled(prompts)
        return {_key(self.name, p): [self._told(s) for s in own] for p, own in zip(prompts, found, strict=True)}

    def _sampled(self, prompts: Sequence[PromptExample]) -> list[list[Sampled]]:
        settings, generation = self.settings, self.settings.generation
        asked = (self.roles, self.name, [p.prompt_ids for p in prompts], generation, self.tokenizer)
        if settings.decoding != "sample":
            apart = settings.decoding == "diverse_beam"
            groups, penalty = (settings.completions, settings.diversity_penalty) if apart else (1, 0.0)
            return beam(*asked, beams=settings.completions, groups=groups, penalty=penalty)
        keys = [_place(self.name, prompt) for prompt in prompts]
        draws = keyed_draws(generation.seed, keys, generation.max_new_tokens)
        return get_engine(settings.engine).sample(*asked, completions=settings.completions, draws=draws)

    def _told(self, sampled: Sampled) -> dict[str, Any]:
        text = self.tokenizer.decode(sampled.ids, skip_special_tokens=True)
        return {"text": text, "tokens": len(sampled.ids), "logp": sum(sampled.logps), "ended": sampled.ended}


def _key(name: str, prompt: PromptExample) -> str:
    """What a policy's answers to a prompt are kept under."""
    return f"{name}/{prompt.row}"


def _place(name: str, prompt: PromptExample) -> int:
    """What a policy's draws for a prompt are made from, wherever the prompt stands."""
    said = hashlib.blake2b(digest(prompt.messages) + name.encode(), digest_size=8)
    return int.from_bytes(said.digest())


def _rows(
    settings: SampleStage, asked: Mapping[str, Asked], answers: Mapping[str, Answers]
) -> Iterator[dict[str, Any]]:
    """The records: the data's own answers where they are wanted, then those of each policy."""
    first = asked[settings.policies[0]]
    for prompt in first.prompts:
        own = list(prompt.answers.items()) if settings.include_responses else []
        drawn = [(name, each) for name in settings.policies for each in answers[_key(name, prompt)]]
        target = {} if prompt.target is None else {"target": prompt.target}
        yield {
            "row": prompt.row,
            "prompt": prompt.messages,
            "responses": [*(text for _, text in own), *(each["text"] for _, each in drawn)],
            "sources": [*(f"data.{name}" for name, _ in own), *(name for name, _ in drawn)],
            "tokens": [*(_length(text, first.tokenizer) for _, text in own), *(each["tokens"] for _, each in drawn)],
            "logps": [*(None for _ in own), *(each["logp"] for _, each in drawn)],
            "ended": [*(True for _ in own), *(each["ended"] for _, each in drawn)],
            **target,
            "fields": dict(prompt.fields),
        }


def _length(text: str, tokenizer: Any) -> int:
    """Tokens of an answer, its end included."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1


def _metrics(settings: SampleStage, asked: Mapping[str, Asked], answers: Mapping[str, Answers]) -> dict[str, float]:
    """What is told of the answers that were drawn: of all of them, and of each policy where there are several."""
    prompts = asked[settings.policies[0]].prompts
    found = _told([answers[_key(name, p)] for name in settings.policies for p in prompts])
    for name in settings.policies if len(settings.policies) > 1 else ():
        own = _told([answers[_key(name, p)] for p in prompts])
        found |= {f"{name}/{metric}": value for metric, value in own.items()}
    return {"prompts": float(len(prompts)), **found}


def _told(groups: Iterable[Answers]) -> dict[str, float]:
    """Means over the completions of all groups; `distinct` is the share of different texts within a group."""
    groups = list(groups)
    every = [each for group in groups for each in group]
    distinct = sum(len({each["text"] for each in group}) for group in groups)
    return {
        "completions": float(len(every)),
        "ended": sum(each["ended"] for each in every) / len(every),
        "length": sum(each["tokens"] for each in every) / len(every),
        "distinct": distinct / len(every),
        "logp": sum(each["logp"] for each in every) / len(every),
    }
