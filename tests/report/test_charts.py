from __future__ import annotations

import math

import pytest

from align.report.charts import comparison_figures, single_values, training_figures


def titles(lines: list[dict]) -> list[str]:
    return [figure.title for figure in training_figures(lines)]


def test_every_logged_number_gets_a_plot_and_the_sides_share_one() -> None:
    line = {
        "step": 10,
        "learning_rate": 1e-4,
        "loss": 0.7,
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.1,
        "rewards/margin": 0.2,
        "house/metric": 3.0,
        "grad_norm": 1.0,
        "epoch": 0.1,
    }
    assert titles([line, line | {"step": 20, "loss": 0.6}]) == [
        "Loss",
        "Rewards",
        "Rewards · margin",
        "House · metric",
        "Learning rate",
        "Grad norm",
    ]


def test_held_out_values_join_those_of_training() -> None:
    (figure,) = training_figures([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.7}])
    assert figure.legend == (("training", 0, False), ("held-out", 1, True))


def test_sides_are_named_and_keep_their_colours_when_held_out() -> None:
    lines = [{"step": s, "rewards/chosen": 1.0 * s, "rewards/rejected": -1.0 * s} for s in (1, 2)]
    (figure,) = training_figures([*lines, {"step": 2, "eval_rewards/chosen": 1.5, "eval_rewards/rejected": -1.0}])
    assert figure.legend == (
        ("chosen", 0, False),
        ("chosen, held-out", 0, True),
        ("rejected", 1, False),
        ("rejected, held-out", 1, True),
    )


def test_the_loss_is_not_drawn_twice() -> None:
    lines = [{"step": 1, "loss": 2.0, "nll_per_token": 2.001}, {"step": 2, "loss": 1.0, "nll_per_token": 1.0}]
    assert titles(lines) == ["Loss"]
    lines[1]["nll_per_token"] = 0.95
    assert titles(lines) == ["Loss", "Nll per token"]


def test_what_is_logged_once_is_a_number_and_no_curve() -> None:
    lines = [{"step": 0, "start/log_ratio": 0.25}, *({"step": s, "loss": 1.0 / s} for s in (1, 2))]
    assert titles(lines) == ["Loss"]
    assert single_values(lines) == [("Start · log ratio", "0.25")]


def test_what_is_not_finite_is_counted() -> None:
    (figure,) = training_figures([{"step": s, "loss": value} for s, value in ((1, 1.0), (2, math.nan), (3, 0.5))])
    assert figure.note == "1 value not finite, not drawn"
    (figure,) = training_figures([{"step": s, "loss": math.inf} for s in (1, 2)])
    assert (figure.svg, figure.note) == ("", "2 values not finite, not drawn")


@pytest.mark.parametrize("lines", [[], [{"loss": 1.0}], [{"step": "x", "loss": 1.0}], [{"step": 1, "note": "text"}]])
def test_nothing_to_draw(lines: list[dict]) -> None:
    assert training_figures(lines) == []


def interval(mean: float) -> dict:
    return {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 9}


def test_a_comparison_shows_every_score_and_the_first_against_the_kl() -> None:
    own = {name: interval(1.0) for name in ("gold", "win_rate", "brevity", "kl", "length", "ended")}
    results = {"candidates": {"sft": own, "dpo": own}, "baseline": "sft"}
    assert [f.title for f in comparison_figures(results)] == ["Gold", "Gold against the KL to sft", "Brevity"]


def test_a_comparison_without_scores_has_no_plot() -> None:
    own = {name: interval(1.0) for name in ("kl", "length", "ended")}
    assert comparison_figures({"candidates": {"sft": own}, "baseline": "sft"}) == []
