from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from align.errors import DataError
from align.methods.slic import SLiC, slic_loss
from align.types import Logps, RankedLogps
from tests.methods.batches import random_ranked
from tests.methods.test_vectors import TOLERANCE


def rows(values: list[float]) -> Logps:
    return Logps(torch.tensor(values, dtype=torch.float64, requires_grad=True), torch.full((len(values),), 5.0))


def pairs_of(inputs: dict) -> RankedLogps:
    """Prompts of two candidates, the better one first."""
    n = len(inputs["pos_logps"])
    both = [v for pair in zip(inputs["pos_logps"], inputs["neg_logps"], strict=True) for v in pair]
    scores, owner = torch.tensor([1.0, 0.0]).repeat(n), torch.arange(n).repeat_interleave(2)
    target = rows(inputs["ref_target_logps"]) if "ref_target_logps" in inputs else None
    return RankedLogps(rows(both), scores, owner, *[torch.ones(n, dtype=torch.float64)] * 2, target)


def listed(values: list[float], scores: list[float]) -> RankedLogps:
    owner = torch.zeros(len(values), dtype=torch.long)
    return RankedLogps(rows(values), torch.tensor(scores), owner, *[torch.ones(1, dtype=torch.float64)] * 2)


def test_vector_with_a_target(vectors):
    inputs, expected = vectors["slic_hf"]["inputs"], vectors["slic_hf"]["expected"]
    out = slic_loss(
        pairs_of(inputs), SLiC(data="d", delta=inputs["delta"], regularisation=inputs["lam"], target="column")
    )
    calibration, target = out.terms["calibration"], out.terms["target"]
    assert calibration.sum.tolist() == pytest.approx(expected["calibration"], abs=TOLERANCE)
    assert (target.coefficient * target.sum).tolist() == pytest.approx(expected["regularizer"], abs=TOLERANCE)
    per_example = calibration.sum + target.coefficient * target.sum
    assert per_example.tolist() == pytest.approx(expected["per_example"], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected["mean"], abs=TOLERANCE)


def test_vector_of_the_ranking_alone(vectors):
    inputs, expected = vectors["slic_hf_rank_only"]["inputs"], vectors["slic_hf_rank_only"]["expected"]
    batch = pairs_of(inputs)
    out = slic_loss(batch, SLiC(data="d", delta=inputs["delta"], regularisation=inputs["lam"]))
    out.loss.backward()
    assert out.terms["calibration"].sum.tolist() == pytest.approx(expected["per_example"], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected["mean"], abs=TOLERANCE)
    assert out.metrics["pairs/active"].value.item() == pytest.approx(expected["active_fraction"], abs=TOLERANCE)
    assert batch.candidates.total.grad[0::2].tolist() == pytest.approx(expected["d_mean_d_pos"], abs=TOLERANCE)


def test_vector_of_a_list(vectors):
    inputs, expected = vectors["slic_list_rank"]["inputs"], vectors["slic_list_rank"]["expected"]
    batch = listed(inputs["logps_best_to_worst"], [4.0, 3.0, 2.0, 1.0])
    config = SLiC(data="d", delta=inputs["delta"], regularisation=0.0, rank_margin=True, pair_reduction="sum")
    assert slic_loss(batch, config).loss.item() == pytest.approx(expected["loss"], abs=TOLERANCE)


def looped(batch: RankedLogps, config: SLiC) -> float:
    """The equations in loops over prompts and pairs."""
    total = 0.0
    for b in range(len(batch.weight)):
        own = [c for c in range(len(batch.scores)) if batch.prompt[c] == b]
        scores = batch.scores.tolist()
        level = {c: sorted({scores[o] for o in own}, reverse=True).index(scores[c]) for c in own}
        last = max(level.values())

        def value(logps: Logps, i: int, reduction: str) -> float:
            return logps.total[i].item() / (logps.length[i].item() if reduction == "token_mean" else 1.0)

        losses = []
        for i, j in itertools.permutations(own, 2):
            apart = level[j] - level[i]
            compared = {
                "all": apart > 0,
                "adjacent": apart == 1,
                "best_worst": apart > 0 and level[i] == 0 and level[j] == last,
            }
            if compared[config.pairs]:
                s_i, s_j = (value(batch.candidates, c, config.reduction) for c in (i, j))
                losses.append(max(0.0, config.delta * (apart if config.rank_margin else 1) - s_i + s_j))
        calibration = sum(losses)
        if config.pair_reduction == "mean":
            calibration /= max(1, len(losses))
        if config.target == "best":
            kept = value(batch.candidates, max(own, key=lambda c: (scores[c], -c)), config.target_reduction)
        else:
            kept = value(batch.target, b, config.target_reduction)
        total += batch.weight[b].item() * (calibration - config.regularisation * kept)
    return total / batch.weight.sum().item()


@pytest.mark.parametrize("pair_reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pairs": "best_worst", "delta": 2.0},
        {"pairs": "adjacent", "reduction": "token_mean", "delta": 0.3},
        {"rank_margin": True, "target": "column"},
        {"target": "column", "target_reduction": "token_mean", "regularisation": 0.7},
        {"target_reduction": "token_mean", "regularisation": 0.0},
    ],
)
def test_against_loops(settings, pair_reduction):
    """Unequal numbers of candidates, unequal lengths, ties at the top and below."""
    batch, config = random_ranked(9, 0), SLiC(data="d", pair_reduction=pair_reduction, **settings)
    g = torch.Generator().manual_seed(3)
    for scores in (
        batch.scores,
        batch.scores.clamp(max=1),
        torch.randint(0, 4, batch.scores.shape, generator=g).double(),
    ):
        ordered = replace(batch, scores=scores)
        assert slic_loss(ordered, config).loss.item() == pytest.approx(looped(ordered, config), rel=1e-9)


def test_a_pair_apart_by_the_margin_has_no_gradient():
    batch = listed([-20.0, -21.5], [1.0, 0.0])
    slic_loss(batch, SLiC(data="d", regularisation=0.0)).loss.backward()
    assert batch.candidates.total.grad.tolist() == [0.0, 0.0]


def test_only_the_order_of_scores_means_something():
    batch = random_ranked(6, 0)
    stretched = replace(batch, scores=batch.scores.exp() * 7)
    for settings in ({}, {"rank_margin": True}, {"pairs": "adjacent"}):
        config = SLiC(data="d", **settings)
        assert slic_loss(batch, config).loss.item() == slic_loss(stretched, config).loss.item()


def test_a_target_that_the_data_has_not_is_told():
    batch = listed([-20.0, -21.5], [1.0, 0.0])
    with pytest.raises(DataError, match="no target"):
        slic_loss(batch, SLiC(data="d", target="column"))
