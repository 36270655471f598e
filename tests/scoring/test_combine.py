from __future__ import annotations

import pytest

from align.errors import DataError, RecipeError, TrainingError
from align.scoring import Blend, get_scorer


class Length:
    label = "size"

    def score(self, prompt: str, completion: str) -> float:
        return float(len(completion))


class Exact:
    reads = ("answer",)

    def score(self, prompt: str, completion: str, *, answer: str) -> float:
        return float(completion == answer)


class Huge:
    label = "size"
    reads = ("answer", "unit")

    def score(self, prompt: str, completion: str, *, answer: str, unit: str) -> float:
        return 1e308


FIELDS = {"answer": "four", "unit": "m"}


def test_a_weighted_sum_and_its_parts() -> None:
    blend = Blend({"length": Length(), "exact": Exact()}, {"length": -0.1, "exact": 2.0})
    assert blend.labels == ["size", "exact"]
    assert blend.reads == ("answer",)
    blended = blend.score("2+2?", "four", FIELDS, 0)
    assert blended.total == pytest.approx(1.6)
    assert blended.parts == {"size": 4.0, "exact": 1.0}


def test_labels_claimed_twice_give_way_to_names() -> None:
    blend = Blend({"length": Length(), "huge": Huge()}, {"length": 1.0, "huge": 0.0})
    assert blend.score("2+2?", "four", FIELDS, 0).parts == {"length": 4.0, "huge": 1e308}
    assert blend.reads == ("answer", "unit")
    assert Blend({"length": Length()}, {"length": 1.0, "size": 1.0}).labels == ["length", "size"]


def test_a_registered_scorer_with_one_of_ours() -> None:
    blend = Blend({"gsm8k": get_scorer("gsm8k"), "length": Length()}, {"gsm8k": 1.0, "length": -0.01})
    blended = blend.score("2+2?", "#### 4", {"answer": 4}, 0)
    assert blended.parts == {"correct": 1.0, "size": 6.0}
    assert blended.total == pytest.approx(0.94)


def test_a_score_that_is_given_counts_beside_the_others() -> None:
    blend = Blend({"length": Length()}, {"reward": 1.0, "length": -0.5})
    assert blend.labels == ["reward", "size"]
    blended = blend.score("2+2?", "four", FIELDS, 0, given={"reward": 3.0})
    assert blended.total == 1.0
    assert blended.parts == {"reward": 3.0, "size": 4.0}
    with pytest.raises(AssertionError, match="weights name"):
        blend.score("2+2?", "four", FIELDS, 0)


@pytest.mark.parametrize("reward", [float("nan"), float("-inf")])
def test_a_given_score_that_is_none_is_told(reward: float) -> None:
    with pytest.raises(TrainingError, match="in row 5"):
        Blend({}, {"reward": 0.0}).score("2+2?", "four", {}, 5, given={"reward": reward})


def test_a_row_without_a_column_is_told() -> None:
    with pytest.raises(DataError, match=r"scorer `exact` reads the column `answer`.*row 5"):
        Blend({"exact": Exact()}, {"exact": 1.0}).score("2+2?", "four", {}, 5)


def test_a_sum_out_of_range_is_told() -> None:
    blend = Blend({"huge": Huge()}, {"huge": 10.0})
    with pytest.raises(TrainingError, match="in row 5 is inf"):
        blend.score("2+2?", "four", FIELDS, 5)


@pytest.mark.parametrize("weights", [{}, {"exact": 1.0}, {"length": float("nan")}, {"length": float("inf")}])
def test_weights_must_fit(weights: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="cannot be weighed"):
        Blend({"length": Length()}, weights)


def test_nothing_cannot_be_weighed() -> None:
    with pytest.raises(RecipeError):
        Blend({}, {})
