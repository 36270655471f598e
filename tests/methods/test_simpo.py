from __future__ import annotations

import pytest
import torch

from align.methods.simpo import SimPO, simpo_loss
from align.types import Logps, PairedLogps
from tests.methods.batches import random_paired
from tests.methods.test_vectors import TOLERANCE
from tests.oracles.trl_oracle import assert_free_pairs_equal_trl


def means(chosen: list[float], rejected: list[float]) -> PairedLogps:
    """Pairs with these token means."""
    length = torch.tensor([3.0, 7.0], dtype=torch.float64)
    sides = [Logps(torch.tensor(side, dtype=torch.float64) * length, length) for side in (chosen, rejected)]
    return PairedLogps(*sides, torch.ones(2, dtype=torch.float64))


def test_vector(vectors):
    inputs, expected = vectors["simpo"]["inputs"], vectors["simpo"]["expected"]
    config = SimPO(data="d", beta=inputs["beta"], gamma_ratio=inputs["gamma"] / inputs["beta"])
    out = simpo_loss(means(inputs["avg_chosen_logps"], inputs["avg_rejected_logps"]), config)
    assert out.terms["loss"].sum.tolist() == pytest.approx(expected["per_example"], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected["mean"], abs=TOLERANCE)


@pytest.mark.parametrize("pack_tokens", [10_000, 40])
def test_against_trl(tmp_path, pack_tokens):
    assert_free_pairs_equal_trl(
        tmp_path, "simpo", "CPO", {"beta": 1.5, "gamma_ratio": 0.4}, pack_tokens,
        loss_type="simpo", cpo_alpha=0.0, beta=1.5, simpo_gamma=0.6,
    )  # fmt: skip


def test_a_completion_twice_as_long_at_the_same_rate_counts_the_same():
    batch = random_paired(5, 0, reference=False)
    longer = PairedLogps(Logps(batch.chosen.total * 2, batch.chosen.length * 2), batch.rejected, batch.weight)
    losses = [simpo_loss(pairs, SimPO(data="d")).loss.item() for pairs in (batch, longer)]
    assert losses[0] == pytest.approx(losses[1])
