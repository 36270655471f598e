from __future__ import annotations

import pytest

from tests.oracles.trl_oracle import assert_pairs_equal_trl, assert_sft_equals_trl

ONE_PACK, MANY_PACKS = 10_000, 40


@pytest.mark.parametrize("pack_tokens", [ONE_PACK, MANY_PACKS])
def test_dpo(tmp_path, pack_tokens):
    assert_pairs_equal_trl(tmp_path, "dpo", "sigmoid", {"beta": 0.3}, pack_tokens)


@pytest.mark.parametrize("pack_tokens", [ONE_PACK, MANY_PACKS])
def test_sft(tmp_path, pack_tokens):
    assert_sft_equals_trl(tmp_path, pack_tokens)
