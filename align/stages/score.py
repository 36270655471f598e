"""Executes `score`: every candidate gets the weighted sum of what a reward model, scorers and functions say of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from align.artifacts.chunks import Chunks
from align.artifacts.store import Store
from align.data.candidates import Candidates, load_candidates
from align.data.records import EMPTY, SAID_TWICE, TIED, TOO_FEW, left_off
from align.scoring import Blend
from align.spec.job import Job
from align.spec.score import ScoreStage
from align.spec.scored import REWARD
from align.stages.publish import publish_records, quarantine_of
from align.stages.rewards import RewardModel
from align.stages.rounds import finished, in_rounds
from align.stages.scorers import scorers_of
from align.training import collectives
from align.training.distributed import process_group
from align.training.guards import StopRequest

ROUND = 16
"""Prompts whose candidates one process scores before it keeps the scores."""

CUT_OFF = "cut off before its end"


def run(job: Job, settings: ScoreStage, store: Store, report: Any) -> None:
    """Score candidates and put them into the store.

    Args:
        job: The resolved stage.
        settings: Its settings, parsed.
        store: Where the reward model is read and the artifact is added.
        report: The worker's reporter.

    Raises:
        RecipeError: A function may not run, or is none that scores.
        DataError: The candidates cannot be read, or lack a column that a scorer reads.
        TrainingError: A scorer returned something that is no score.
        Preempted: A signal asked for a stop; what is finished is kept.
    """
    began = time.monotonic()
    with process_group(deepspeed=False):
        stop = StopRequest()
        try:
            report(0, 0, "reading candidates")
            quarantine = quarantine_of(job) if collectives.rank() == 0 else None
            source = job.data[settings.samples]
            candidates, data_report = load_candidates(source, folder=Path(job.folder), quarantine=quarantine)
            chunks = Chunks(Path(job.work))
            _score(job, settings, store, candidates, chunks, stop, report)
            if collectives.rank() == 0:
                scored = chunks.read()
                rows = [_row(each, scored[_key(each)]) for each in candidates]
                data_report.noted |= dict(_noted(rows, scored).most_common())
                publish_records(
                    job,
                    store,
                    rows,
                    reports={settings.samples: data_report},
                    metrics=_metrics(rows),
                    seconds=time.monotonic() - began,
                )
                chunks.drop()
            collectives.barrier()
        finally:
            stop.close()


def _score(
    job: Job,
    settings: ScoreStage,
    store: Store,
    candidates: Sequence[Candidates],
    chunks: Chunks,
    stop: StopRequest,
    report: Any,
) -> None:
    """Score what has no scores yet."""
    there = finished(chunks)
    report.resumed_from_step = len(there)
    if len(there) == len(candidates):
        return
    report(len(there), len(candidates), "loading the scorers")
    judge = _Judge(job, settings, store)
    in_rounds(
        candidates,
        ROUND,
        judge,
        key=_key,
        there=there,
        chunks=chunks,
        stop=stop,
        tell=lambda done: report(len(there) + done, len(candidates), "scoring"),
    )


class _Judge:
    """Scores the candidates of some prompts; what one says twice is scored once."""

    def __init__(self, job: Job, settings: ScoreStage, store: Store) -> None:
        self.settings = settings
        self.reward = RewardModel(store, job.inputs[settings.reward]) if settings.reward is not None else None
        weights = {part: settings.weights.get(part, 1.0) for part in settings.parts}
        self.blend = Blend(scorers_of(job, settings), weights)

    def __call__(self, part: Sequence[Candidates]) -> dict[str, Any]:
        wanted = [
            list(dict.fromkeys(filter(None, map(self._asked, each.samples.responses, each.samples.ended))))
            for each in part
        ]
        rewards = self._rewards(part, wanted)
        return {
            _key(each): self._judged(each, texts, own) for each, texts, own in zip(part, wanted, rewards, strict=True)
        }

    def _asked(self, text: str, ended: bool) -> str | None:
        """A text that has to be scored."""
        return text if text.strip() and (ended or self.settings.missing_eos == "keep") else None

    def _rewards(self, part: Sequence[Candidates], wanted: Sequence[list[str]]) -> list[dict[str, float | str]]:
        """For each prompt text -> reward, or why there is none; empty without a reward model."""
        if self.reward is None:
            return [{} for _ in part]
        return self.reward([each.samples for each in part], wanted)

    def _judged(self, each: Candidates, texts: Sequence[str], rewards: Mapping[str, float | str]) -> dict[str, Any]:
        """Score, parts and, where there is none, the reason, of every candidate."""
        found = {text: self._blended(each, text, rewards.get(text)) for text in texts}
        said: set[str] = set()
        scores, parts, rules = [], [], []
        for text, ended in zip(each.samples.responses, each.samples.ended, strict=True):
            score, own, rule = self._of_one(text, ended, found)
            scores.append(score)
            parts.append(own)
            rules.append(rule or (SAID_TWICE if text in said else None))
            said.add(text)
        columns = {label: [own.get(label) for own in parts] for label in self.blend.labels}
        return {"scores": scores, "parts": columns, "rules": rules}

    def _of_one(
        self, text: str, ended: bool, found: Mapping[str, tuple[float | None, dict[str, float], str | None]]
    ) -> tuple[float | None, dict[str, float], str | None]:
        if not text.strip():
            return None, {}, EMPTY
        if ended or self.settings.missing_eos == "keep":
            return found[text]
        if self.settings.missing_eos == "replace":
            return self.settings.missing_eos_score, {}, None
        return None, {}, CUT_OFF

    def _blended(
        self, each: Candidates, text: str, reward: float | str | None
    ) -> tuple[float | None, dict[str, float], str | None]:
        if isinstance(reward, str):
            return None, {}, reward
        given = {} if reward is None else {REWARD: reward}
        blended = self.blend.score(each.prompt, text, each.fields, each.samples.row, given)
        return blended.total, blended.parts, None


def _key(each: Candidates) -> str:
    """What the scores of a prompt's candidates are kept under."""
    return str(each.samples.row)


def _row(each: Candidates, judged: Mapping[str, Any]) -> dict[str, Any]:
    """A record: the candidates with their scores, and a note where no method could learn from them."""
    kept = {
        text: score for text, score in zip(each.samples.responses, judged["scores"], strict=True) if score is not None
    }
    note = TOO_FEW if len(kept) < 2 else TIED if len(set(kept.values())) == 1 else None
    return {**each.as_row(), "scores": judged["scores"], "parts": judged["parts"], **({"note": note} if note else {})}


def _noted(rows: Sequence[Mapping[str, Any]], scored: Mapping[str, Any]) -> Counter[str]:
    """Why candidates have no score of their own, and lists that are of no use to methods on lists."""
    rules = (rule for judged in scored.values() for rule in judged["rules"] if rule is not None)
    return Counter(map(left_off, rules)) + Counter(row["note"] for row in rows if "note" in row)


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What is told of the scores: over all candidates, over prompts, by source and by part."""
    lists = [own for row in rows if (own := [score for score in row["scores"] if score is not None])]
    every = [score for own in lists for score in own]
    told = {"prompts": float(len(rows)), "scored": float(len(every))}
    if not every:
        return told
    told |= {"mean": fmean(every), "std": pstdev(every)}
    told |= {"best": fmean(map(max, lists)), "spread": fmean(max(own) - min(own) for own in lists)}
    told["tied"] = sum(row.get("note") == TIED for row in rows) / len(rows)
    return told | {f"{name}/mean": fmean(values) for name, values in _columns(rows) if values}


def _columns(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[float]]]:
    """Scores by source, where something says the source, and every part of them where there are several."""
    by_source: dict[str, list[float]] = {}
    by_part: dict[str, list[float]] = {}
    for row in rows:
        for source, score in zip(row["sources"], row["scores"], strict=True):
            if source and score is not None:
                by_source.setdefault(source, []).append(score)
        for part, scores in row["parts"].items():
            by_part.setdefault(part, []).extend(score for score in scores if score is not None)
    yield from by_source.items() if len(by_source) > 1 else ()
    yield from by_part.items() if len(by_part) > 1 else ()
