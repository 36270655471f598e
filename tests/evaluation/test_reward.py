"""The numbers of a reward model's evaluation, on cases that can be done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.evaluation.reward import Judged, calibration, correlation, evaluate_rewards, headline, ranks


def pair(better: float, worse: float, lengths: tuple[int, int] = (3, 3)) -> Judged:
    return Judged((better, worse), (1.0, 0.0), lengths)


def test_accuracy_is_a_mean_over_prompts_and_a_tie_is_half() -> None:
    found = evaluate_rewards([pair(2, 1), pair(1, 2), pair(1, 1), pair(5, 0)])
    assert found["accuracy"]["mean"] == (1 + 0 + 0.5 + 1) / 4
    assert found["margin"]["mean"] == (1 - 1 + 0 + 5) / 4
    assert found["accuracy"]["low"] < 0.625 < found["accuracy"]["high"]
    assert (found["prompts"], found["pairs"], found["completions"]) == (4, 4, 8)


def test_a_list_counts_as_one_prompt_and_ties_of_the_data_make_no_pair() -> None:
    listed = Judged((3.0, 2.0, 1.0, 0.0), (9.0, 5.0, 5.0, 7.0), (1, 1, 1, 1))
    assert sorted(listed.margins()) == [-2.0, -1.0, 1.0, 2.0, 3.0]
    found = evaluate_rewards([listed, pair(0, 1)])
    assert found["accuracy"]["mean"] == pytest.approx((3 / 5 + 0) / 2)
    assert found["pairs"] == 6
    assert evaluate_rewards([Judged((1.0, 2.0), (1.0, 1.0), (1, 2))])["accuracy"] is None


def test_a_calibrated_model_has_no_error() -> None:
    """A model whose margin is the true log-odds is right as often as it says."""
    rng = np.random.default_rng(0)
    sizes = np.abs(rng.normal(size=40_000) * 2)
    signs = np.where(rng.random(40_000) < 1 / (1 + np.exp(-sizes)), 1, -1)
    assert calibration(signs * sizes)["error"] < 0.01
    assert calibration(signs * sizes * 4)["error"] > 0.1, "four times as sure as it may be"
    assert calibration(np.sign(signs * sizes) * 0.01)["error"] > 0.1, "less sure than it could be"


def test_bins_of_the_calibration() -> None:
    log_odds = math.log(0.83 / 0.17)
    found = calibration([log_odds, log_odds, log_odds, -log_odds, 0.0, 100.0])
    assert (found["bins"][0]["low"], found["bins"][0]["high"]) == (0.5, 0.55)
    told = {round(b["low"], 2): b for b in found["bins"] if b["n"]}
    assert set(told) == {0.5, 0.8, 0.95}
    assert told[0.8]["n"] == 4
    assert told[0.8]["expected"] == pytest.approx(0.83)
    assert told[0.8]["right"] == 0.75
    assert told[0.5]["right"] == told[0.5]["expected"] == 0.5
    assert found["error"] == pytest.approx(4 / 6 * 0.08)


def test_correlation_with_length() -> None:
    """Spearman sees any monotone relation, Pearson a straight one."""
    judged = [pair(math.exp(2 * n), math.exp(2 * n + 1), (2 * n, 2 * n + 1)) for n in range(1, 6)]
    length = evaluate_rewards(judged)["length"]
    assert length["spearman"] == pytest.approx(1.0)
    assert 0.4 < length["pearson"] < 0.8
    assert evaluate_rewards([pair(1.0, 0.0), pair(0.3, 0.1)])["length"]["pearson"] is None, "all of one length"
    assert correlation([0.1] * 7, range(7)) is None
    assert ranks([10.0, 30.0, 20.0, 20.0]).tolist() == [1.0, 4.0, 2.5, 2.5]


def test_the_headline_has_numbers_alone() -> None:
    found = headline(evaluate_rewards([pair(2, 1), pair(1, 3)]))
    assert found["evaluation/accuracy"] == 0.5
    assert found["evaluation/reward_mean"] == 1.75
    assert found["evaluation/reward_std"] == pytest.approx(np.std([2, 1, 1, 3]))
    assert "evaluation/length_pearson" not in found
    assert all(isinstance(value, float) for value in found.values())
