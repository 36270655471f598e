from __future__ import annotations

import math

import pytest
import torch

from align.methods.kto import KTO, kto_loss, kto_statistic
from align.types import Logps, UnpairedLogps
from tests.methods.batches import means, random_unpaired
from tests.methods.test_vectors import TOLERANCE
from tests.oracles.trl_oracle import assert_unpaired_equals_trl


def unpaired(policy: list[float], reference: list[float], label: list[bool], statistics: dict | None = None):
    row = lambda totals: Logps(torch.tensor(totals, dtype=torch.float64), torch.ones(len(totals)))  # noqa: E731
    label64, ones = torch.tensor(label, dtype=torch.float64), torch.ones(len(label), dtype=torch.float64)
    return UnpairedLogps(row(policy), label64, ones, row(reference), statistics or {})


@pytest.mark.parametrize("name", ["kto", "kto_weighted", "kto_negative_kl_clamped"])
def test_vectors(vectors, name):
    inputs, expected = vectors[name]["inputs"], vectors[name]["expected"]
    config = KTO(
        data="d", reference="r", beta=inputs["beta"], desirable_weight=inputs["lambda_D"],
        undesirable_weight=inputs["lambda_U"],
    )  # fmt: skip
    other = unpaired(inputs["kl_policy_logps"], inputs["kl_ref_logps"], inputs["desirable"])
    statistics = means(kto_statistic(other, config))
    out = kto_loss(unpaired(inputs["policy_logps"], inputs["ref_logps"], inputs["desirable"], statistics), config)
    assert out.terms["loss"].sum.tolist() == pytest.approx(expected["per_example"], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected["mean"], abs=TOLERANCE)
    assert out.metrics["kl"].value.item() == pytest.approx(expected["z0"], abs=TOLERANCE)


@pytest.mark.parametrize("pack_tokens", [10_000, 40])
def test_against_trl(tmp_path, pack_tokens):
    weights = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    assert_unpaired_equals_trl(tmp_path, "kto", weights, pack_tokens, **weights)


def test_rewards_are_told_apart_by_label():
    batch = unpaired([-1.0, -2.0, -3.0], [-2.0, -2.5, -3.0], [True, False, False], {"kl": torch.tensor(0.0)})
    metrics = kto_loss(batch, KTO(data="d", reference="r", beta=1.0)).metrics
    assert metrics["rewards/chosen"].value.item() == 1.0
    assert metrics["rewards/rejected"].value.item() == 0.25
    assert metrics["logps/rejected"].value.item() == -2.5


def test_a_step_of_one_label_alone_is_allowed():
    batch = unpaired([-1.0, -2.0], [-2.0, -2.5], [True, True], {"kl": torch.tensor(0.2)})
    out = kto_loss(batch, KTO(data="d", reference="r"))
    assert math.isfinite(out.loss.item())
    assert out.metrics["rewards/rejected"].weight.sum().item() == 0.0


def test_the_same_completion_wants_opposite_things_under_opposite_labels():
    """sigmoid(-x) + sigmoid(x) = 1: whatever z0 is, the two losses of a row sum to its weight."""
    batch = random_unpaired(6, 0)
    flipped = UnpairedLogps(batch.policy, 1 - batch.label, batch.weight, batch.reference)
    losses = []
    for rows in (batch, flipped):
        rows = UnpairedLogps(rows.policy, rows.label, rows.weight, rows.reference, {"kl": torch.tensor(0.3)})
        losses.append(kto_loss(rows, KTO(data="d", reference="r")).terms["loss"].sum)
    torch.testing.assert_close(losses[0] + losses[1], batch.weight)
