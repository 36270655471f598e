from __future__ import annotations

from typing import Any

import pytest

from align.report.verdict import direction, finding


def interval(mean: float, half: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 100}


def results(
    dpo: dict[str, Any], differences: dict[str, Any] | None = None, sft: dict[str, Any] | None = None
) -> dict[str, Any]:
    baseline = {
        "gold": interval(0.5),
        "win_rate": interval(0.5, 0.0),
        "kl": interval(0.0, 0.0),
        "length": interval(30, 1),
    }
    return {
        "candidates": {"sft": baseline | (sft or {}), "dpo": dpo},
        "baseline": "sft",
        "confidence": 0.95,
        **({"differences": {"dpo": differences}} if differences is not None else {}),
    }


@pytest.mark.parametrize(
    ("difference", "sign"),
    [(interval(0.02), 1), (interval(-0.02), -1), (interval(0.005), 0)],
    ids=["above", "below", "chance"],
)
def test_the_paired_difference_decides(difference: dict[str, float], sign: int) -> None:
    # The two intervals overlap widely: only the pairing tells.
    content = results({"gold": interval(0.51, 0.2)}, {"gold": difference}, sft={"gold": interval(0.5, 0.2)})
    assert direction(content, "dpo", "gold") == sign


@pytest.mark.parametrize(("mean", "sign"), [(0.53, 1), (0.47, -1), (0.515, 0)])
def test_without_differences_overlap_decides(mean: float, sign: int) -> None:
    assert direction(results({"gold": interval(mean)}), "dpo", "gold") == sign


@pytest.mark.parametrize(("rate", "sign"), [(0.6, 1), (0.4, -1), (0.505, 0)])
def test_a_win_rate_is_held_against_one_half(rate: float, sign: int) -> None:
    assert direction(results({"win_rate": interval(rate)}), "dpo", "win_rate") == sign


def test_a_kl_and_the_baseline_are_not_judged() -> None:
    content = results({"kl": interval(5.0)})
    assert direction(content, "dpo", "kl") == 0
    assert direction(content, "sft", "gold") == 0


def test_a_missing_number_is_not_judged() -> None:
    assert direction(results({}), "dpo", "gold") == 0


def test_finding_names_the_lead_and_its_price() -> None:
    dpo = {"gold": interval(0.6), "kl": interval(9.13, 0.5), "length": interval(33, 1)}
    text = finding(results(dpo, {"gold": interval(0.1), "length": interval(3.2, 0.5)}))
    assert text == (
        "dpo scores highest on gold, 0.600, above sft by 0.100 (95 % interval 0.090–0.110), "
        "at a KL of 9.1 nats and answers 3.2 tokens longer."
    )


def test_finding_calls_chance_chance() -> None:
    text = finding(results({"gold": interval(0.505)}, {"gold": interval(0.005)}))
    assert text is not None
    assert "within chance" in text


@pytest.mark.parametrize("mean", [0.4, 0.5], ids=["worse", "a tie"])
def test_finding_admits_that_nothing_improved(mean: float) -> None:
    text = finding(results({"gold": interval(mean)}, {"gold": interval(mean - 0.5)}))
    assert text == "No candidate scores above the baseline sft on gold, 0.500."


def test_no_scores_no_finding() -> None:
    assert finding({"candidates": {"sft": {"kl": interval(0.0)}}, "baseline": "sft"}) is None
