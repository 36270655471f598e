from __future__ import annotations

import pytest
import torch

from align.rollout import keyed_draws, listed_draws
from tests.rollout.plain import settings


def test_a_list_has_one_table_of_its_seed() -> None:
    table = torch.rand(5, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    draws = listed_draws(5, settings(seed=3))
    assert all(torch.equal(draws(i, 0), table[i]) for i in range(5))


def test_completions_of_a_list_have_rows_of_their_own() -> None:
    draws = listed_draws(2, settings(), completions=3)
    rows = {tuple(draws(i, k).tolist()) for i in range(2) for k in range(3)}
    assert len(rows) == 6


def test_a_key_decides_and_not_its_place() -> None:
    first, second = keyed_draws(0, [7, 8, 9], tokens=24), keyed_draws(0, [9, 7], tokens=24)
    assert torch.equal(first(0, 1), second(1, 1))
    assert torch.equal(first(2, 0), second(0, 0))
    assert not torch.equal(first(0, 0), first(0, 1))
    assert not torch.equal(first(0, 0), first(1, 0))
    assert not torch.equal(first(0, 0), keyed_draws(1, [7], tokens=24)(0, 0))


def test_names_of_keys_do_not_run_into_each_other() -> None:
    assert not torch.equal(keyed_draws(1, [11])(0, 1), keyed_draws(11, [1])(0, 1))
    assert not torch.equal(keyed_draws(0, [1])(0, 11), keyed_draws(0, [11])(0, 1))


def test_fewer_numbers_are_the_beginning_of_more() -> None:
    assert torch.equal(keyed_draws(0, [3], tokens=10)(0, 0), keyed_draws(0, [3])(0, 0)[:10])


def test_numbers_are_uniform_and_leave_the_global_state_alone() -> None:
    state = torch.random.get_rng_state()
    drawn = torch.stack([keyed_draws(0, [i], tokens=100)(0, 0) for i in range(200)])
    assert torch.equal(state, torch.random.get_rng_state())
    assert drawn.dtype == torch.float64
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(drawn[:, 0].mean()) == pytest.approx(0.5, abs=0.07), "of first numbers too"
    correlation = torch.corrcoef(drawn[:, :2].T)[0, 1]
    assert abs(float(correlation)) < 0.25
