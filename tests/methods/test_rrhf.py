from __future__ import annotations

import itertools

import pytest
import torch

from align.methods.rrhf import RRHF, rrhf_loss
from align.types import Logps, RankedLogps
from tests.methods.batches import random_ranked
from tests.methods.test_vectors import TOLERANCE


def ranked(tokens: list[list[float]], scores: list[float], prompt_length: int = 1) -> RankedLogps:
    """One prompt's candidates from the log-probabilities of their tokens."""
    total = torch.tensor([sum(row) for row in tokens], dtype=torch.float64, requires_grad=True)
    length = torch.tensor([len(row) for row in tokens], dtype=torch.float64)
    owner, one = torch.zeros(len(tokens), dtype=torch.long), torch.ones(1, dtype=torch.float64)
    return RankedLogps(Logps(total, length), torch.tensor(scores, dtype=torch.float64), owner, one, prompt_length * one)


def of_vector(vectors, name: str) -> tuple[RankedLogps, dict, dict]:
    inputs, expected = vectors[name]["inputs"], vectors[name]["expected"]
    batch = ranked(inputs["response_token_logps"], inputs["rewards"], inputs.get("prompt_len", 1))
    return batch, inputs, expected


@pytest.mark.parametrize(
    ("reduction", "ft", "total"),
    [("sum", "ft_loss_sum", "total_paper"), ("token_mean", "ft_loss_token_mean", "total_rank_plus_token_mean_ft")],
)
def test_vector(vectors, reduction, ft, total):
    batch, _, expected = of_vector(vectors, "rrhf")
    out = rrhf_loss(batch, RRHF(data="d", ft_reduction=reduction))
    assert out.terms["rank"].value.item() == pytest.approx(expected["rank_loss"], abs=TOLERANCE)
    assert out.terms["best"].value.item() == pytest.approx(expected[ft], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected[total], abs=TOLERANCE)
    assert out.metrics["pairs/active"].weight.sum().item() == expected["n_pairs"]


def test_the_published_code_as_run(vectors):
    batch, inputs, expected = of_vector(vectors, "rrhf_official_code_as_run")
    out = rrhf_loss(batch, RRHF(data="d", compat="official", rank_weight=inputs["rrhf_weight"]))
    assert out.terms["rank"].value.item() == pytest.approx(expected["rank_loss"], abs=TOLERANCE)
    assert out.terms["best"].value.item() == pytest.approx(expected["sft_loss"], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected["total"], abs=TOLERANCE)


def looped(batch: RankedLogps, config: RRHF) -> float:
    """The equations in loops over prompts and pairs."""
    total = 0.0
    for b in range(len(batch.weight)):
        own = [c for c in range(len(batch.scores)) if batch.prompt[c] == b]
        s, n = batch.candidates.total.tolist(), batch.candidates.length.tolist()
        width = batch.prompt_length[b].item() + max(n[c] for c in own)
        p = {c: s[c] / (width if config.compat == "official" else n[c]) for c in own}
        rank = sum(
            max(0.0, p[i] - p[j]) for i, j in itertools.permutations(own, 2) if batch.scores[i] < batch.scores[j]
        )
        best = max(own, key=lambda c: (batch.scores[c].item(), -c))
        ft = -s[best] if config.ft_reduction == "sum" and config.compat == "none" else -p[best]
        total += batch.weight[b].item() * (config.rank_weight * rank + ft)
    return total / batch.weight.sum().item()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ft_reduction": "sum"},
        {"rank_weight": 10.0},
        {"compat": "official"},
        {"compat": "official", "rank_weight": 2},
    ],
)
def test_against_loops(settings):
    """Unequal numbers of candidates, unequal lengths, ties at the top and below."""
    batch, config = random_ranked(9, 0), RRHF(data="d", **settings)
    assert rrhf_loss(batch, config).loss.item() == pytest.approx(looped(batch, config), rel=1e-9)
    tied = RankedLogps(batch.candidates, batch.scores.clamp(max=1), batch.prompt, batch.weight, batch.prompt_length)
    assert rrhf_loss(tied, config).loss.item() == pytest.approx(looped(tied, config), rel=1e-9)


def test_the_rank_gradient_counts_violated_pairs(vectors):
    """Per token of a candidate: pairs it wrongly wins minus pairs it wrongly loses, over its length."""
    batch, _, _ = of_vector(vectors, "rrhf")
    rrhf_loss(batch, RRHF(data="d")).terms["rank"].value.backward()
    p, r = batch.candidates.mean.tolist(), batch.scores.tolist()
    expected = []
    for i in range(4):
        wins = sum(r[i] < r[j] and p[i] > p[j] for j in range(4))
        losses = sum(r[i] > r[j] and p[i] < p[j] for j in range(4))
        expected.append((wins - losses) / batch.candidates.length[i].item())
    assert batch.candidates.total.grad.tolist() == pytest.approx(expected)


def test_ties_make_no_pair_and_the_first_of_the_best_is_imitated():
    batch = ranked([[-1.0], [-3.0], [-2.0]], [0.5, 0.5, 0.5])
    out = rrhf_loss(batch, RRHF(data="d"))
    assert out.terms["rank"].value.item() == 0.0
    assert out.terms["best"].value.item() == 1.0
    assert out.metrics["rewards/accuracy"].weight.sum().item() == 0.0
