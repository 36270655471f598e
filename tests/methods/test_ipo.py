from __future__ import annotations

import pytest

from align.methods.ipo import IPO, ipo_loss
from tests.methods.test_vectors import TOLERANCE, paired
from tests.oracles.trl_oracle import assert_pairs_equal_trl


@pytest.mark.parametrize(("reduction", "name"), [("sum", "ipo_summed_logps"), ("token_mean", "ipo_token_mean_logps")])
def test_vectors(vectors, reduction, name):
    inputs, expected = vectors[name]["inputs"], vectors[name]["expected"]
    out = ipo_loss(paired(inputs), IPO(data="d", reference="r", tau=inputs["tau"], reduction=reduction))
    assert out.terms["loss"].sum.tolist() == pytest.approx(expected["per_example"], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected["mean"], abs=TOLERANCE)


@pytest.mark.parametrize("pack_tokens", [10_000, 40])
def test_against_trl(tmp_path, pack_tokens):
    assert_pairs_equal_trl(tmp_path, "ipo", "ipo", {"tau": 0.3}, pack_tokens)
