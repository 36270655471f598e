"""Executes `select`: of scored candidates some are kept, as conversations to imitate or as pairs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.artifacts.store import Store
from align.data import DataReport, select
from align.data.candidates import Candidates, load_candidates, load_conversations
from align.data.records import EMPTY, NO_SCORE, SAID_TWICE, TIED, TOO_FEW, Conversation
from align.errors import DataError
from align.spec.job import Job
from align.spec.select import PAIRED, SelectStage
from align.stages.publish import publish_records, quarantine_of

SELECTION = "selection.json"
"""How many were kept and why others were not, in the artifact."""

BELOW = "below the threshold"
NOT_BEST = "not among the best"
SAME_PATH = "same calculation as another, or a false one"
CAPPED = "more than max_per_prompt"
NO_PAIR = "in no pair"
NEAR = "pair within min_margin"
NONE_KEPT = "no candidate kept"


@dataclass
class Selection:
    """What becomes of candidates.

    Attributes:
        kept: How many.
        left: Why others were not -> how many.
        prompts: Why nothing came of a prompt -> how many.
        pairs: Pairs that were not made -> how many.
    """

    kept: int = 0
    left: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)

    def as_file(self) -> dict[str, Any]:
        """The same as plain values, what is most often first."""
        counters = {"left": self.left, "prompts": self.prompts, "pairs": self.pairs}
        told = {name: {why: n for why, n in own.most_common() if n} for name, own in counters.items()}
        return {"kept": self.kept, **told}


@dataclass(frozen=True)
class Eligible:
    """The candidates of one prompt that can be selected: scored, with words, and said for the first time.

    Attributes:
        candidates: All of them.
        places: Where those stand.
    """

    candidates: Candidates
    places: list[int]

    @property
    def texts(self) -> list[str]:
        return [self.candidates.samples.responses[place] for place in self.places]

    @property
    def scores(self) -> list[float]:
        scores = (self.candidates.scores[place] for place in self.places)
        return [score for score in scores if score is not None]


def run(job: Job, settings: SelectStage, store: Store, report: Any) -> None:
    """Select and put what is selected into the store.

    Args:
        job: The resolved stage.
        settings: Its settings, parsed.
        store: Where the artifact is added.
        report: The worker's reporter.

    Raises:
        DataError: The candidates cannot be read, or none is selected.
    """
    began = time.monotonic()
    report(0, 0, "reading candidates")
    source, folder, quarantine = job.data[settings.candidates], Path(job.folder), quarantine_of(job)
    candidates, data_report = load_candidates(source, folder=folder, quarantine=quarantine)
    reports = {settings.candidates: data_report}
    rows: list[dict[str, Any]] = []
    if settings.include is not None:
        own, reports[settings.include] = load_conversations(job.data[settings.include], folder=folder)
        rows += [_included(each, settings.include) for each in own]
    selection = Selection()
    eligible = [_eligible(each, selection) for each in candidates]
    made = _pairs(settings, eligible, selection) if settings.how in PAIRED else _kept(settings, eligible, selection)
    if not made:
        reasons = ", ".join(f"{n} {why}" for why, n in (selection.prompts + selection.left).most_common())
        raise DataError(
            f"nothing is selected of {len(candidates)} prompts: {reasons}",
            where=f"stages.{job.stage}",
            fix="look at the scores (align data preview RECIPE NAME), or select otherwise",
        )
    _count(data_report, selection)
    publish_records(
        job,
        store,
        [*rows, *made],
        reports=reports,
        metrics=_metrics(settings, candidates, rows, made, selection),
        files={SELECTION: selection.as_file()},
        seed=settings.seed if settings.how == "random_pairs" else None,
        seconds=time.monotonic() - began,
    )


def _included(conversation: Conversation, name: str) -> dict[str, Any]:
    """A conversation that is kept whatever the candidates are like."""
    weight = {} if conversation.weight == 1.0 else {"weight": conversation.weight}
    return {"row": conversation.row, "messages": conversation.messages, "source": "data", **weight}


def _eligible(each: Candidates, selection: Selection) -> Eligible:
    said: set[str] = set()
    places = []
    for place, (text, score) in enumerate(zip(each.samples.responses, each.scores, strict=True)):
        rule = EMPTY if not text.strip() else NO_SCORE if score is None else SAID_TWICE if text in said else None
        if rule is None:
            places.append(place)
            said.add(text)
        else:
            selection.left[rule] += 1
    return Eligible(each, places)


# Conversations -------------------------------------------------------------------------------------------------------


def _kept(settings: SelectStage, eligible: Sequence[Eligible], selection: Selection) -> list[dict[str, Any]]:
    """The candidates that are kept, each as a conversation."""
    made = []
    for each, kept in zip(eligible, _chosen(settings, eligible, selection), strict=True):
        if settings.max_per_prompt is not None and len(kept) > settings.max_per_prompt:
            best = sorted(kept, key=lambda i: -each.scores[i])[: settings.max_per_prompt]
            selection.left[CAPPED] += len(kept) - len(best)
            kept = sorted(best)
        if not kept:
            selection.prompts[NONE_KEPT] += 1
        selection.kept += len(kept)
        made += [_conversation(each, i) for i in kept]
    return made


def _chosen(settings: SelectStage, eligible: Sequence[Eligible], selection: Selection) -> list[list[int]]:
    """For each prompt the indices, among its eligible candidates, of those that are selected."""
    if settings.how == "top_fraction":
        return _best_of_all(settings.fraction, eligible, selection)
    chosen = []
    for each in eligible:
        reached = select.above(each.scores, settings.threshold)
        if settings.how == "rft":
            correct = [i in reached for i in range(len(each.places))]
            kept = select.rft(each.texts, correct)
            selection.left[BELOW] += len(each.places) - len(reached)
            selection.left[SAME_PATH] += len(reached) - len(kept)
        elif settings.how == "above":
            kept = reached
            selection.left[BELOW] += len(each.places) - len(kept)
        else:
            kept = sorted(select.best_of(each.scores, settings.n))
            selection.left[NOT_BEST] += len(each.places) - len(kept)
        chosen.append(kept)
    return chosen


def _best_of_all(fraction: float, eligible: Sequence[Eligible], selection: Selection) -> list[list[int]]:
    """Those of the best share of all candidates, by prompt."""
    flat = [(p, i, score) for p, each in enumerate(eligible) for i, score in enumerate(each.scores)]
    chosen: list[list[int]] = [[] for _ in eligible]
    for place in select.top_fraction([score for *_, score in flat], fraction) if flat else ():
        prompt, i, _ = flat[place]
        chosen[prompt].append(i)
    selection.left[NOT_BEST] += len(flat) - sum(map(len, chosen))
    return chosen


def _conversation(each: Eligible, i: int) -> dict[str, Any]:
    own, place = each.candidates.samples, each.places[i]
    messages = [*own.prompt, {"role": "assistant", "content": own.responses[place]}]
    told = {"source": own.sources[place], "score": each.scores[i], "fields": dict(each.candidates.fields)}
    return {"row": each.candidates.origin, "messages": messages, **told}


# Pairs ---------------------------------------------------------------------------------------------------------------


def _pairs(settings: SelectStage, eligible: Sequence[Eligible], selection: Selection) -> list[dict[str, Any]]:
    """Pairs of a better and a worse candidate."""
    made = []
    for each in eligible:
        scores = each.scores
        drawn = _PAIRS[settings.how](settings, scores, each.candidates.origin)
        pairs = [(a, b) for a, b in drawn if scores[a] - scores[b] >= settings.min_margin]
        selection.pairs[NEAR] += len(drawn) - len(pairs)
        used = {i for pair in pairs for i in pair}
        selection.kept += len(used)
        selection.left[NO_PAIR] += len(scores) - len(used)
        if not pairs:
            near = NEAR if drawn else TIED
            selection.prompts[TOO_FEW if len(scores) < 2 else near] += 1
        made += [_pair(each, a, b) for a, b in pairs]
    return made


_PAIRS: dict[str, Callable[[SelectStage, list[float], int], select.Pairs]] = {
    "best_worst": lambda settings, scores, row: select.best_vs_worst(scores),
    "all_pairs": lambda settings, scores, row: select.all_pairs(scores),
    "adjacent_pairs": lambda settings, scores, row: select.adjacent(scores),
    # A draw of its own for every prompt, whatever stands before it.
    "random_pairs": lambda settings, scores, row: select.random_pairs(scores, settings.n, (settings.seed << 40) + row),
    "tournament": lambda settings, scores, row: select.tournament(scores),
}


def _pair(each: Eligible, better: int, worse: int) -> dict[str, Any]:
    own, scores = each.candidates.samples, each.scores
    chosen, rejected = (own.responses[each.places[i]] for i in (better, worse))
    target = {} if own.target is None else {"target": own.target}
    sources = {"chosen_source": own.sources[each.places[better]], "rejected_source": own.sources[each.places[worse]]}
    told = {"margin": scores[better] - scores[worse], "chosen_score": scores[better], "rejected_score": scores[worse]}
    return {
        "row": each.candidates.origin,
        "prompt": own.prompt,
        "chosen": chosen,
        "rejected": rejected,
        **target,
        **told,
        **sources,
        "fields": dict(each.candidates.fields),
    }


# What is told --------------------------------------------------------------------------------------------------------


def _count(report: DataReport, selection: Selection) -> None:
    """Put what became of the prompts into their report."""
    report.examples -= selection.prompts.total()
    report.dropped |= dict(selection.prompts.most_common())


def _metrics(
    settings: SelectStage,
    candidates: Sequence[Candidates],
    included: Sequence[Any],
    made: Sequence[dict[str, Any]],
    selection: Selection,
) -> dict[str, float]:
    told = {
        "prompts": len(candidates),
        "prompts_kept": len(candidates) - selection.prompts.total(),
        "candidates": sum(len(each.samples.responses) for each in candidates),
        "candidates_kept": selection.kept,
    }
    if settings.how in PAIRED:
        told |= {"pairs": len(made), "margin": sum(row["margin"] for row in made) / len(made)}
    else:
        told |= {"included": len(included), "conversations": len(included) + len(made)}
        told |= {"score": sum(row["score"] for row in made) / len(made)}
    return {name: float(value) for name, value in told.items()}
