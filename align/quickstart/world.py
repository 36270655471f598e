"""The tables of the film-review world, made on demand from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from random import Random
from typing import Any, ClassVar, Final

from pydantic import BaseModel, Field, ValidationError

from align.errors import RecipeError
from align.quickstart.gold import judge
from align.quickstart.lexicon import FEATURES, TITLES, TONES
from align.quickstart.prompts import HELDOUT_ONE_IN, MAX_FEATURES, Task
from align.quickstart.reviews import chance, draw_task, shuffled, write_review

Row = dict[str, Any]

CARE: Final = {
    "corpus": (0.0, 0.9),
    "demonstrations": (0.4, 0.9),
    "preferences": (0.2, 1.0),
    "ranked": (0.2, 1.0),
}
"""Range of the writers' care, drawn uniformly per review."""

SMALLEST_GAP: Final = 0.05
"""Reviews whose gold rewards differ by less are drawn again: a label on them would say nothing."""

OPTIONS: Final = {
    "preferences": ("label_noise", "shuffle_labels"),
    "ranked": ("candidates", "label_noise", "shuffle_labels"),
}
"""Which options each part reads; the other parts take none."""

MAX_HELDOUT: Final = (
    len(TITLES) * len(TONES) * sum(math.comb(len(FEATURES), k) for k in range(1, MAX_FEATURES + 1))
) // (2 * HELDOUT_ONE_IN)
"""Held-out prompts never repeat a combination; half of all there are, so that drawing them stays quick."""


class FilmReviews:
    """Film reviews asked for by title, tone and features, written with more or less care.

    - ``corpus``: careless reviews, to pretrain on: well-formed English, middling gold reward.
    - ``demonstrations``: reviews of mixed but better quality, for SFT.
    - ``preferences``: two reviews of wider quality per prompt; the one of higher gold reward is chosen, except that a
      label is flipped with probability ``label_noise``, or is a coin flip under ``shuffle_labels``.
    - ``ranked``: ``candidates`` such reviews per prompt with scores: the gold reward plus uniform noise, as wide as it
      takes for two of the row's candidates to be in the wrong order with probability ``label_noise`` on average, near
      ones more often than far ones. Under ``shuffle_labels`` the scores are the row's gold rewards in random order.
    - ``heldout``: distinct prompts whose combination of film, tone and features no other part ever holds, whatever the
      seed.

    Row i depends on part, seed, options and i only, so a shorter table is the beginning of a longer one.
    """

    version: ClassVar[int] = 2
    parts: ClassVar[dict[str, str]] = {
        "corpus": "prompt_completion",
        "demonstrations": "prompt_completion",
        "preferences": "pairs",
        "ranked": "ranked",
        "heldout": "prompts",
    }

    class Options(BaseModel, extra="forbid"):
        """What ``preferences`` and ``ranked`` can be told; the other parts take no options."""

        candidates: int = Field(default=4, ge=2, le=8)
        """Reviews per prompt of ``ranked``."""
        label_noise: float = Field(default=0.1, ge=0.0, lt=0.5)
        """Probability that a pair's label is the wrong way round."""
        shuffle_labels: bool = False
        """Coin-flip labels: the control from which nothing can be learnt."""

    def generate(self, part: str, rows: int, seed: int, options: dict[str, Any]) -> Iterator[Row]:
        """Makes the first `rows` rows of a part.

        Raises:
            RecipeError: Unknown part, an option that the part does not read, a bad value, or too many held-out rows.
        """
        if part not in self.parts:
            raise RecipeError(f"the film-reviews world has no part {part!r}", fix=f"one of: {', '.join(self.parts)}")
        if rows < 1:
            raise RecipeError(f"rows is {rows}", fix="ask for at least one row")
        settings = self._settings(part, options)
        if part == "heldout":
            return self._heldout(rows, seed)
        if part == "preferences":
            return (self._pair(_streams(part, seed, row), settings) for row in range(rows))
        if part == "ranked":
            return (self._list(_streams(part, seed, row), settings) for row in range(rows))
        return (self._review(part, _streams(part, seed, row)) for row in range(rows))

    def _settings(self, part: str, options: dict[str, Any]) -> Options:
        known = OPTIONS.get(part, ())
        ignored = [name for name in options if name not in known and (not known or name in self.Options.model_fields)]
        if ignored:
            raise RecipeError(
                f"part {part!r} of the film-reviews world ignores {', '.join(sorted(ignored))}",
                fix=f"remove it; {part} takes {', '.join(known) or 'no options'}",
            )
        try:
            settings = self.Options.model_validate(options)
        except ValidationError as error:
            first = error.errors()[0]
            raise RecipeError(
                f"option {'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}",
                fix=f"options of {part}: {', '.join(known)}",
            ) from None
        if settings.shuffle_labels and "label_noise" in options:
            raise RecipeError("label_noise has no effect under shuffle_labels", fix="give one of the two")
        return settings

    def _heldout(self, rows: int, seed: int) -> Iterator[Row]:
        if rows > MAX_HELDOUT:
            raise RecipeError(f"{rows} held-out prompts asked for", fix=f"ask for at most {MAX_HELDOUT}")
        return _distinct_prompts(_streams("heldout", seed, 0)("texts"), rows)

    def _review(self, part: str, stream: Callable[[str], Random]) -> Row:
        rng = stream("texts")
        task, prompt = _training_task(rng)
        return {"prompt": prompt, "completion": _careful_review(rng, task, part)}

    def _pair(self, stream: Callable[[str], Random], settings: Options) -> Row:
        rng = stream("texts")
        task, prompt = _training_task(rng)
        while True:
            better, worse = sorted(
                (_careful_review(rng, task, "preferences") for _ in range(2)),
                key=lambda review: judge(task, review).gold,
                reverse=True,
            )
            if judge(task, better).gold - judge(task, worse).gold >= SMALLEST_GAP:
                break
        # Labels have their own stream, so that the same seed gives the same texts under every labelling.
        flipped = chance(stream("labels"), 0.5 if settings.shuffle_labels else settings.label_noise)
        chosen, rejected = (worse, better) if flipped else (better, worse)
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    def _list(self, stream: Callable[[str], Random], settings: Options) -> Row:
        rng = stream("texts")
        task, prompt = _training_task(rng)
        reviews: list[str] = []
        golds: list[float] = []
        while len(reviews) < settings.candidates:
            review = _careful_review(rng, task, "ranked")
            gold = judge(task, review).gold
            if all(abs(gold - other) >= SMALLEST_GAP for other in golds):
                reviews.append(review)
                golds.append(gold)
        labels = stream("labels")
        if settings.shuffle_labels:
            scores = shuffled(labels, golds)
        else:
            width = noise_width(golds, settings.label_noise)
            scores = [gold + width * (2.0 * labels.random() - 1.0) for gold in golds]
        return {"prompt": prompt, "responses": reviews, "scores": [round(score, 4) for score in scores]}


def noise_width(golds: Sequence[float], share: float) -> float:
    """How far uniform noise has to reach for two of these to change places with probability `share` on average.

    The difference of two uniform numbers in [-w, w] is triangular: it exceeds a gap g with (1 - g / 2w)^2 / 2.
    """
    gaps = [abs(a - b) for a, b in combinations(golds, 2)]

    def swapped(width: float) -> float:
        return sum(max(0.0, 1.0 - gap / (2.0 * width)) ** 2 / 2.0 for gap in gaps) / len(gaps)

    if share == 0.0:
        return 0.0
    low, high = 0.0, 1.0
    while swapped(high) < share:
        low, high = high, 2.0 * high
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (middle, high) if swapped(middle) < share else (low, middle)
    return high


def _streams(part: str, seed: int, row: int) -> Callable[[str], Random]:
    """Independent random streams of one row, by purpose."""
    return lambda purpose: Random(f"film-reviews/{FilmReviews.version}/{part}/{seed}/{row}/{purpose}")


def _training_task(rng: Random) -> tuple[Task, str]:
    while True:
        task, prompt = draw_task(rng)
        if not task.is_heldout():
            return task, prompt


def _careful_review(rng: Random, task: Task, part: str) -> str:
    low, high = CARE[part]
    return write_review(rng, task, care=low + (high - low) * rng.random())


def _distinct_prompts(rng: Random, rows: int) -> Iterator[Row]:
    seen: set[tuple[str, str, frozenset[str]]] = set()
    while len(seen) < rows:
        task, prompt = draw_task(rng)
        key = (task.title, task.tone, frozenset(task.features))
        if task.is_heldout() and key not in seen:
            seen.add(key)
            yield {"prompt": prompt}
