"""transformers' continuous batching as an engine; a call takes a second to set up, so there are few."""

from __future__ import annotations

import pytest
import torch

from align.errors import LaunchError
from align.models import RoleModel
from align.rollout import get_engine, sample
from tests.rollout.plain import greedy, logps, settings


@pytest.fixture
def stopping(tokenizer, roles: RoleModel, prompts):
    own, tokenizer.eos_token_id = tokenizer.eos_token_id, greedy(roles, "policy", prompts[0], 24, ())[7]
    yield tokenizer
    tokenizer.eos_token_id = own


def test_greedy_is_that_of_our_own_loop(roles: RoleModel, stopping, prompts) -> None:
    cold = settings(temperature=0.0, batch_size=8)
    before = roles.config._attn_implementation
    found = get_engine("transformers").sample(roles, "policy", prompts, cold, stopping, completions=2)
    expected = sample(roles, "policy", prompts, cold, stopping, completions=2)
    for own, other in zip(found, expected, strict=True):
        assert [(each.ids, each.ended) for each in own] == [(each.ids, each.ended) for each in other]
        assert own[0].logps == pytest.approx(other[0].logps, abs=1e-4)
    assert roles.config._attn_implementation == before
    assert any(own[0].ended for own in found)


def test_what_is_cut_counts_in_log_probabilities(roles: RoleModel, tokenizer, prompts) -> None:
    state = torch.random.get_rng_state()
    told: list[tuple[int, int]] = []
    cut = settings(temperature=0.7, top_k=4, max_new_tokens=6)
    found = get_engine("transformers").sample(
        roles, "policy", prompts[:4], cut, tokenizer, completions=3, tell=lambda *done: told.append(done)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert told == [(12, 12)]
    for prompt, own in zip(prompts, found, strict=False):
        assert len(own) == 3
        for each in own:
            assert each.logps == pytest.approx(logps(roles, "policy", prompt, each.ids, 0.7), abs=1e-4)
    assert any(own[0].ids != own[1].ids for own in found)


def test_what_it_cannot_do(roles: RoleModel, tokenizer, prompts) -> None:
    engine = get_engine("transformers")
    assert engine.sample(roles, "policy", [], settings(), tokenizer) == []
    with pytest.raises(LaunchError, match="ZeRO-3"):
        engine.sample(roles, "policy", prompts, settings(), tokenizer, synced=bool)
