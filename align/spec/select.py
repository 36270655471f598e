"""Settings of `kind: select`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from align.spec.base import DataRef, Unread
from align.spec.data import Format
from align.spec.records import RecordsStage

Single = Literal["rft", "best_of_n", "top_fraction", "above"]
"""Ways to keep candidates."""
Paired = Literal["best_worst", "all_pairs", "adjacent_pairs", "random_pairs", "tournament"]
"""Ways to set them against each other."""

PAIRED: tuple[str, ...] = get_args(Paired)


def _read_by(field: str, *hows: str) -> Unread:
    """A setting that only some ways of selecting read."""
    return Unread(
        field,
        lambda stage: stage.how not in hows,
        f"only {', '.join(f'`how: {how}`' for how in hows)} {'reads' if len(hows) == 1 else 'read'} it",
        "remove it",
    )


class SelectStage(RecordsStage):
    """Selects from scored candidates: conversations to imitate, or pairs of a better and a worse one."""

    unread: ClassVar[tuple[Unread, ...]] = (
        _read_by("threshold", "rft", "above"),
        _read_by("n", "best_of_n", "random_pairs"),
        _read_by("fraction", "top_fraction"),
        _read_by("max_per_prompt", "rft", "top_fraction", "above"),
        _read_by("include", *get_args(Single)),
        _read_by("min_margin", *PAIRED),
        _read_by("seed", "random_pairs"),
    )

    kind: Literal["select"] = "select"
    candidates: Annotated[str, DataRef(("ranked",), without=("mt_bench",))]
    """Candidates with scores: a `score` stage, or data, of one turn each."""
    how: Single | Paired
    """Conversations: correct solutions that calculate differently (`rft`), the best of each prompt (`best_of_n`), the
    best of all (`top_fraction`), those that reach a threshold (`above`). Pairs: the best against the worst
    (`best_worst`), every two of different scores (`all_pairs`), neighbours in the ranking (`adjacent_pairs`), some of
    all (`random_pairs`), or those of a knock-out (`tournament`)."""
    threshold: float = 1.0
    """Score from which on a candidate is kept; for `rft`, from which on it is correct."""
    n: PositiveInt = 1
    """Candidates kept of each prompt, or pairs made of it."""
    fraction: float = Field(default=0.1, gt=0.0, le=1.0)
    """Share of all candidates that is kept."""
    max_per_prompt: PositiveInt | None = None
    """Candidates kept of each prompt at most, the best of those that are selected: easy prompts give more."""
    include: Annotated[str, DataRef(("conversation",))] | None = None
    """Conversations that are kept besides, in front of the others: the human answers of RFT."""
    min_margin: NonNegativeFloat = 0.0
    """Pairs whose scores differ by less are not made."""
    seed: NonNegativeInt = 0
    """Of the draw of pairs."""

    @property
    def makes(self) -> Format:
        return "pairs" if self.how in PAIRED else "messages"
