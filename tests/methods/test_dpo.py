from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align.methods.dpo import DPO, dpo_loss
from align.types import Logps, PairedLogps
from tests.methods.batches import random_paired
from tests.methods.test_vectors import TOLERANCE, paired
from tests.oracles.trl_oracle import assert_pairs_equal_trl


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("robust_dpo", {"loss": "robust", "label_smoothing": 0.1}),
        ("dpo_hinge_rso", {"loss": "rso"}),
        ("dpo_length_normalised", {"reduction": "token_mean"}),
        ("dpo_reference_free", {"reference": None}),
    ],
)
def test_vectors(vectors, name, settings):
    inputs, expected = vectors[name]["inputs"], vectors[name]["expected"]
    out = dpo_loss(paired(inputs), DPO(**({"data": "d", "reference": "r", "beta": inputs["beta"]} | settings)))
    assert out.terms["loss"].sum.tolist() == pytest.approx(expected["per_example"], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected["mean"], abs=TOLERANCE)


@pytest.mark.parametrize("pack_tokens", [10_000, 40])
@pytest.mark.parametrize(
    ("loss_type", "settings", "trl_settings"),
    [
        ("robust", {"loss": "robust", "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("hinge", {"loss": "rso"}, {}),
        ("sigmoid_norm", {"reduction": "token_mean"}, {}),
    ],
)
def test_against_trl(tmp_path, loss_type, settings, trl_settings, pack_tokens):
    assert_pairs_equal_trl(tmp_path, "dpo", loss_type, {"beta": 0.3} | settings, pack_tokens, **trl_settings)


def test_without_a_reference_it_is_one_that_finds_everything_certain():
    batch = random_paired(5, 0)
    certain = lambda own: Logps(torch.zeros_like(own.total), own.length)  # noqa: E731
    frozen = PairedLogps(certain(batch.chosen), certain(batch.rejected), batch.weight)
    free = dpo_loss(replace(batch, reference=None), DPO(data="d", reference=None))
    assert free.loss.item() == dpo_loss(replace(batch, reference=frozen), DPO(data="d", reference="r")).loss.item()


def test_null_has_to_be_written():
    with pytest.raises(ValueError, match="reference"):
        DPO(data="d")


def test_robust_has_no_bias():
    """Labels flipped with the assumed probability give, on average, the loss of clean labels."""
    batch, e = random_paired(6, 0), 0.2
    flipped = PairedLogps(
        batch.rejected,
        batch.chosen,
        batch.weight,
        PairedLogps(batch.reference.rejected, batch.reference.chosen, batch.weight),
    )
    loss = lambda pairs, **s: dpo_loss(pairs, DPO(data="d", reference="r", **s)).loss.item()  # noqa: E731
    robust = [loss(pairs, loss="robust", label_smoothing=e) for pairs in (batch, flipped)]
    assert (1 - e) * robust[0] + e * robust[1] == pytest.approx(loss(batch))


def test_the_hinge_has_no_gradient_beyond_its_margin():
    row = lambda total: Logps(torch.tensor([total]).requires_grad_(), torch.tensor([4.0]))  # noqa: E731
    frozen = PairedLogps(row(-20.0), row(-20.0), torch.ones(1))
    batch = PairedLogps(row(-9.0), row(-20.0), torch.ones(1), frozen)
    dpo_loss(batch, DPO(data="d", reference="r", loss="rso")).loss.backward()
    assert batch.chosen.total.grad.item() == 0.0
