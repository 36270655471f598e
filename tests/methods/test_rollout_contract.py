"""What every method on rollouts must keep beside the contract of all methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.methods import Method, all_methods
from align.types import Advantages, Batch, LossOutput, Needs, Rollout, RolloutLogps, map_logps
from tests.methods.batches import config_of, policy_leaves, tensors
from tests.methods.rollouts import learnt, of_prompts, random_rollout
from tests.methods.test_contract import own_settings, values_of


@pytest.fixture(params=[kind for kind, method in all_methods().items() if method.batch is Batch.ROLLOUT])
def method(request: pytest.FixtureRequest) -> Method:
    return all_methods()[request.param]


def settings_of(method: Method, **settings: Any) -> Iterator[Any]:
    """The default settings, and those that differ from them by one of the method's own."""
    yield config_of(method, **settings)
    for name in sorted(own_settings(method)):
        for value in values_of(method, name):
            yield config_of(method, **settings | {name: value})


def drawn(method: Method, rollout: Rollout, config: Any) -> RolloutLogps:
    """A batch in the state that it was drawn from."""
    batch = learnt(method, rollout, config)
    return replace(batch, policy=batch.old.clone())


def same(one: Advantages, other: Advantages, tokens: Any = slice(None)) -> None:
    torch.testing.assert_close(one.advantages[tokens], other.advantages[tokens], rtol=1e-9, atol=1e-12)
    if one.returns is not None:
        torch.testing.assert_close(one.returns[tokens], other.returns[tokens], rtol=1e-9, atol=1e-12)


def backward(method: Method, batch: RolloutLogps, config: Any) -> LossOutput:
    policy_leaves(batch)
    out = method.loss(batch, config)
    out.loss.backward()
    return out


# --- advantages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_are_one_finite_number_per_token(method: Method, dtype: torch.dtype):
    rollout = random_rollout(5, dtype=dtype)
    for config in settings_of(method):
        found = method.advantages(rollout, config)
        assert (found.returns is not None) == (Needs.VALUES in method.needs)
        for each in tensors(found):
            assert each.shape == rollout.owner.shape
            assert each.dtype == dtype
            assert torch.isfinite(each).all()
            assert not each.requires_grad


def test_advantages_are_pure_and_deterministic(method: Method):
    rollout = random_rollout(5)
    before = map_logps(replace(rollout, beta=None), torch.clone)
    for config in settings_of(method):
        first, second = method.advantages(rollout, config), method.advantages(rollout, config)
        assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))
        for name in (f.name for f in fields(rollout) if f.name != "beta"):
            assert torch.equal(getattr(rollout, name), getattr(before, name)), f"`advantages` wrote into {name}"


def test_the_order_of_prompts_does_not_matter_to_advantages(method: Method):
    rollout, order = random_rollout(5), [3, 0, 4, 1, 2]
    which = torch.cat([(rollout.prompt[rollout.owner] == p).nonzero().flatten() for p in order])
    for config in settings_of(method):
        whole = method.advantages(rollout, config)
        same(method.advantages(of_prompts(rollout, order), config), map_logps(whole, lambda t: t[which]))


def test_better_completions_have_higher_advantages(method: Method):
    """Without a KL, and with a critic that says nothing, they rise with the score of their completion."""
    rollout = random_rollout(1)
    rollout = replace(rollout, values=torch.zeros_like(rollout.values), kept=torch.ones_like(rollout.kept))
    for config in settings_of(method, reference=None):
        found = method.advantages(replace(rollout, beta=0.0), config).advantages[rollout.last]
        assert found.argsort().tolist() == rollout.scores.argsort().tolist()


def test_what_is_dropped_is_not_counted_among_the_rest(method: Method):
    """Whatever a prompt without a kept completion scored, the other prompts' advantages are what they were."""
    rollout = random_rollout(5)
    rollout = replace(rollout, kept=rollout.kept & (rollout.prompt != 2))
    there, there_token = rollout.prompt == 2, (rollout.prompt == 2)[rollout.owner]
    wild = replace(
        rollout,
        scores=torch.where(there, rollout.scores * 1000 + 77, rollout.scores),
        values=torch.where(there_token, rollout.values - 50, rollout.values),
        logps=torch.where(there_token, rollout.logps - 9, rollout.logps),
    )
    for config in settings_of(method):
        same(method.advantages(wild, config), method.advantages(rollout, config), ~there_token)


def test_nothing_kept_and_equal_scores_are_survived(method: Method):
    rollout = random_rollout(3)
    nothing = replace(rollout, kept=torch.zeros_like(rollout.kept))
    equal = replace(rollout, scores=torch.full_like(rollout.scores, 0.7), beta=0.0)
    single = replace(rollout, kept=torch.arange(len(rollout.kept)) == 4)
    for config in settings_of(method):
        for each in (nothing, equal, single):
            assert torch.isfinite(method.advantages(each, config).advantages).all()
            assert torch.isfinite(method.loss(learnt(method, each, config), config).loss)


# --- losses ---------------------------------------------------------------------------------------------------------


def test_where_it_was_drawn_every_token_moves_by_its_advantage(method: Method):
    """Gradients have the opposite sign of the advantages, and dropped completions have none."""
    rollout = random_rollout(6)
    for config in settings_of(method, reference=None):
        batch = drawn(method, rollout, config)
        out = backward(method, batch, config)
        kept = batch.token_weight > 0
        assert torch.equal(batch.policy.grad[kept].sign(), -batch.advantages[kept].sign())
        assert not batch.policy.grad[~kept].any()
        assert out.metrics["policy/clip_fraction"].value.item() == 0.0
        assert out.metrics["policy/approx_kl"].value.item() == 0.0


def test_a_likelier_good_token_lowers_the_loss(method: Method):
    config = config_of(method, reference=None)
    batch = drawn(method, random_rollout(3), config)
    before = method.loss(batch, config).loss.item()
    for token in (batch.token_weight > 0).nonzero().flatten().tolist():
        moved = batch.policy.clone()
        moved[token] += 0.01
        change = method.loss(replace(batch, policy=moved), config).loss.item() - before
        assert change * batch.advantages[token].item() < 0


def test_dropped_completions_are_not_read(method: Method):
    """Neither loss nor gradients nor metrics depend on what is said of a completion of weight 0."""
    rollout = random_rollout(6)
    for config in settings_of(method):
        batch = learnt(method, rollout, config)
        dropped = batch.token_weight == 0
        assert dropped.any()
        held = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in ("owner", "length", "weight")}
        moved = {name: torch.where(dropped, t - k / 4, t) for k, (name, t) in enumerate(held.items()) if t is not None}
        wild = replace(batch, **moved)
        outs = [backward(method, each, config) for each in (wild, batch)]
        assert outs[0].loss.item() == pytest.approx(outs[1].loss.item(), rel=1e-12)
        torch.testing.assert_close(wild.policy.grad, batch.policy.grad)
        for name, metric in outs[0].metrics.items():
            assert metric.value.item() == pytest.approx(outs[1].metrics[name].value.item(), rel=1e-12), name


def test_entropy_is_taken_off_as_a_mean_over_tokens(method: Method):
    plain, weighted = config_of(method), config_of(method, entropy_weight=0.4)
    batch = learnt(method, random_rollout(4), plain)
    batch.entropy.requires_grad_()
    without, out = method.loss(batch, plain), method.loss(batch, weighted)
    mean = (batch.entropy * batch.token_weight).sum() / batch.token_weight.sum()
    assert (without.loss - out.loss).item() == pytest.approx(0.4 * mean.item())
    assert out.metrics["policy/entropy"].value.item() == pytest.approx(mean.item())
    out.loss.backward()
    torch.testing.assert_close(batch.entropy.grad, -0.4 * batch.token_weight / batch.token_weight.sum())


def test_without_a_reference_no_kl_is_taken(method: Method):
    rollout = random_rollout(4, beta=0.0)
    low, high = config_of(method, reference=None, beta=0.0), config_of(method, reference=None, beta=0.7)
    batch = learnt(method, rollout, low)
    outs = [method.loss(batch, config) for config in (low, high)]
    assert outs[0].loss.item() == outs[1].loss.item()
    assert "policy/kl" not in outs[0].metrics
    same(*(method.advantages(replace(rollout, reference=None), config) for config in (low, high)))


def test_the_kl_that_is_logged_is_that_of_whole_completions(method: Method):
    config = config_of(method)
    batch = learnt(method, random_rollout(4), config)
    sums = [(batch.policy - batch.reference)[batch.owner == c].sum() for c in range(len(batch.weight))]
    expected = (torch.stack(sums) * batch.weight).sum() / batch.weight.sum()
    assert method.loss(batch, config).metrics["policy/kl"].value.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("kind", [kind for kind, method in all_methods().items() if Needs.VALUES in method.needs])
def test_the_critic_moves_to_the_returns(kind: str):
    method = all_methods()[kind]
    for config in settings_of(method):
        batch = learnt(method, random_rollout(6), config)
        backward(method, batch, config)
        pull: Tensor = batch.values.grad * (batch.values - batch.returns)
        assert (pull >= 0).all()
        assert pull.sum() > 0
        assert not batch.values.grad[batch.token_weight == 0].any()
