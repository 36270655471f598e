from __future__ import annotations

import pytest
import torch

from align.methods.orpo import ORPO, log_odds, orpo_loss
from align.types import Logps, PairedLogps
from tests.methods.batches import random_paired
from tests.methods.test_simpo import means
from tests.methods.test_vectors import TOLERANCE
from tests.oracles.trl_oracle import assert_free_pairs_equal_trl


def test_vector(vectors):
    inputs, expected = vectors["orpo"]["inputs"], vectors["orpo"]["expected"]
    batch = means(inputs["avg_chosen_logps"], inputs["avg_rejected_logps"])
    out = orpo_loss(batch, ORPO(data="d", odds_weight=inputs["lam"]))
    odds = out.terms["odds"]
    assert odds.sum.tolist() == pytest.approx(expected["per_example_or_term"], abs=TOLERANCE)
    assert out.metrics["rewards/margin"].sum.tolist() == pytest.approx(expected["log_odds_ratio"], abs=TOLERANCE)
    assert odds.value.item() == pytest.approx(inputs["lam"] * expected["or_term_mean"], abs=TOLERANCE)
    assert inputs["chosen_nll"] + odds.value.item() == pytest.approx(expected["total"], abs=TOLERANCE)


def test_the_likelihood_is_a_token_mean():
    batch = random_paired(6, 0, reference=False)
    w, chosen, prompt = batch.weight, batch.chosen, batch.prompt
    alone = -(w * chosen.total).sum() / (w * chosen.length).sum()
    every = -(w * (chosen.total + prompt.total)).sum() / (w * (chosen.length + prompt.length)).sum()
    for loss_on, expected in (("completion", alone), ("all", every)):
        nll = orpo_loss(batch, ORPO(data="d", loss_on=loss_on)).terms["nll"]
        assert nll.value.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("pack_tokens", [10_000, 40])
def test_against_trl(tmp_path, pack_tokens):
    settings = {"odds_weight": 0.25, "loss_on": "all"}
    assert_free_pairs_equal_trl(tmp_path, "orpo", "ORPO", settings, pack_tokens, beta=0.25)


def test_a_certain_completion_is_finite():
    batch = PairedLogps(
        *(Logps(torch.tensor([t]).requires_grad_(), torch.tensor([5.0])) for t in (0.0, -1e-9)), torch.ones(1)
    )
    out = orpo_loss(batch, ORPO(data="d"))
    out.loss.backward()
    assert all(torch.isfinite(side.total.grad).all() for side in (batch.chosen, batch.rejected))
    assert torch.isfinite(out.loss)


def test_log_odds_are_exact_near_certainty_and_far_from_it():
    mean = torch.tensor([-1e-5, -0.1, -30.0], dtype=torch.float64)
    exact = mean - torch.log1p(-torch.exp(mean))
    found = log_odds(Logps(mean.float() * 4, torch.full((3,), 4.0)))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
