from __future__ import annotations

import pytest

from align.evaluation.metrics import Measured, compare_candidates

SFT = Measured({"gold": [0.2, 0.4, 0.6, 0.8], "brevity": [1, 1, 1, 1]}, [0.0] * 4, [10, 20, 30, 40], [True] * 4)
DPO = Measured(
    {"gold": [0.5, 0.7, 0.9, 0.8], "brevity": [1, 2, 1, 2]}, [2.0, 4.0, -1.0, 3.0], [12, 22, 32, 42], [True, False] * 2
)


def compared(**measured: Measured) -> dict:
    return compare_candidates(measured, baseline="sft", confidence=0.95, resamples=300)


def test_every_candidate_has_every_metric_in_the_order_of_the_table() -> None:
    results = compared(sft=SFT, dpo=DPO)
    assert list(results["candidates"]) == ["sft", "dpo"]
    for own in results["candidates"].values():
        assert list(own) == ["gold", "win_rate", "brevity", "kl", "length", "ended"]
        assert all(list(interval) == ["mean", "low", "high", "n"] for interval in own.values())
    assert (results["baseline"], results["confidence"], results["n"]) == ("sft", 0.95, 4)


@pytest.mark.parametrize(
    ("metric", "mean"),
    [("gold", 0.725), ("win_rate", 0.875), ("brevity", 1.5), ("kl", 2.0), ("length", 27.0), ("ended", 0.5)],
)
def test_means(metric: str, mean: float) -> None:
    assert compared(sft=SFT, dpo=DPO)["candidates"]["dpo"][metric]["mean"] == pytest.approx(mean)


def test_differences_are_paired() -> None:
    results = compared(sft=SFT, dpo=DPO)
    assert list(results["differences"]) == ["dpo"]
    ours = results["differences"]["dpo"]
    assert list(ours) == ["gold", "brevity", "length", "ended"]
    assert ours["gold"]["mean"] == pytest.approx(0.225)
    # Every answer is two tokens longer: unpaired intervals would overlap widely, the paired one has no width.
    assert (ours["length"]["low"], ours["length"]["high"]) == (2.0, 2.0)


def test_the_baseline_ties_with_itself() -> None:
    baseline = compared(sft=SFT, dpo=DPO)["candidates"]["sft"]
    assert baseline["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 4}
    assert baseline["kl"]["mean"] == 0.0


def test_without_scorers_there_are_no_win_rates() -> None:
    bare = Measured({}, [0.0, 0.5], [3, 4], [True, True])
    results = compared(sft=bare)
    assert list(results["candidates"]["sft"]) == ["kl", "length", "ended"]
    assert results["differences"] == {}
