from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align.methods.ops import clipped, gae, group_mean, group_std, kl_estimate, token_rewards, whiten
from tests.methods.rollouts import ragged, random_rollout, rollout_of
from tests.methods.test_vectors import TOLERANCE


def near(values: torch.Tensor, expected: list[list[float]], mask: list[list[int]]) -> None:
    assert values.tolist() == pytest.approx(ragged(expected, mask).tolist(), abs=TOLERANCE)


# --- numbers of the vectors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates(vectors, estimator):
    inputs, expected = vectors["kl_estimators"]["inputs"], vectors["kl_estimators"]["expected"]
    rollout = rollout_of(inputs)
    found = kl_estimate(rollout.logps, rollout.reference, estimator)
    near(found, expected[estimator], inputs["mask"])
    if estimator != "k2":
        sums = torch.zeros(2, dtype=torch.float64).index_add(0, rollout.owner, found)
        assert sums.tolist() == pytest.approx(expected[f"{estimator}_seq_sum"], abs=TOLERANCE)
        assert found.mean().item() == pytest.approx(expected[f"{estimator}_token_mean"], abs=TOLERANCE)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_token_rewards(vectors, estimator):
    vector = vectors[f"ppo_token_rewards_{estimator}"]
    near(
        token_rewards(rollout_of(vector["inputs"]), estimator), vector["expected"]["rewards"], vector["inputs"]["mask"]
    )


def test_the_advantage_estimate(vectors):
    inputs, expected = vectors["ppo_gae"]["inputs"], vectors["ppo_gae"]["expected"]
    mask = inputs["mask"]
    rewards, values = ragged(inputs["rewards"], mask), ragged(inputs["values"], mask)
    found = gae(rewards, values, torch.tensor(mask).sum(1), gamma=inputs["gamma"], lam=inputs["lam"])
    near(found, expected["advantages"], mask)
    near(found + values, expected["returns"], mask)


@pytest.mark.parametrize(
    ("of", "settings", "key"),
    [
        ("advantages", {}, "adv_whitened_unbiased_var"),
        ("advantages", {"unbiased": False}, "adv_whitened_biased_var"),
        ("rewards", {"keep_mean": True}, "rewards_whitened_keep_mean_unbiased"),
    ],
)
def test_whitening(vectors, of, settings, key):
    inputs = vectors["ppo_whiten"]["inputs"]
    near(whiten(ragged(inputs[of], inputs["mask"]), **settings), vectors["ppo_whiten"]["expected"][key], inputs["mask"])


def test_groups(vectors):
    inputs, expected = vectors["grpo_advantages"]["inputs"], vectors["grpo_advantages"]["expected"]
    scores = torch.tensor(inputs["rewards"], dtype=torch.float64)
    group = torch.zeros(len(scores), dtype=torch.long)
    centred = scores - group_mean(scores, group)
    assert centred.tolist() == pytest.approx(expected["mean_only"], abs=TOLERANCE)
    for name, unbiased in (("unbiased", True), ("biased", False)):
        std = group_std(scores, group, unbiased=unbiased)
        assert std.tolist() == pytest.approx([expected[f"std_{name}"]] * 4, abs=TOLERANCE)
        scaled = centred / (std + inputs["eps"])
        assert scaled.tolist() == pytest.approx(expected[f"{name}_std"], abs=TOLERANCE)


# --- what they are for -----------------------------------------------------------------------------------------------


def test_what_the_estimators_estimate():
    """In expectation over the policy k1 and k3 are the KL, and the gradient of k2 is the KL's."""
    g = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    logps, reference = torch.log_softmax(logits, 0), torch.log_softmax(other, 0)
    kl = (logps.exp() * (logps - reference)).sum()
    (exact,) = torch.autograd.grad(kl, logits, retain_graph=True)
    drawn = logps.exp().detach()  # each token as often as the policy draws it; a sample's own odds have no gradient
    expected = {k: (drawn * kl_estimate(logps, reference, k)).sum() for k in ("k1", "k2", "k3")}
    gradients = {k: torch.autograd.grad(value, logits, retain_graph=True)[0] for k, value in expected.items()}
    assert expected["k1"].item() == pytest.approx(kl.item())
    assert expected["k3"].item() == pytest.approx(kl.item())
    torch.testing.assert_close(gradients["k2"], exact)
    assert not torch.allclose(gradients["k3"], exact, rtol=0.05)
    assert gradients["k1"].abs().max() < 1e-12
    assert all((kl_estimate(logps, reference, k) >= 0).all() for k in ("k2", "k3"))


def test_k3_of_tiny_ratios_keeps_its_digits_in_fp32():
    d = torch.tensor([1e-4, -3e-4])
    assert kl_estimate(d, torch.zeros(2), "k3").tolist() == pytest.approx((d**2 / 2 - d**3 / 6).tolist(), rel=2e-3)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 0.0), (0.8, 1.0)])
def test_the_advantage_estimate_is_a_discounted_sum_of_errors(gamma, lam):
    """Per completion, so that no value or reward of the next one comes in."""
    rollout = random_rollout(4)
    rewards = token_rewards(rollout, "k1")
    found = gae(rewards, rollout.values, rollout.length, gamma=gamma, lam=lam)
    split = (each.split(rollout.length.tolist()) for each in (rewards, rollout.values, found))
    for r, v, own in zip(*split, strict=True):
        ahead = torch.cat([v[1:], torch.zeros(1, dtype=v.dtype)])
        errors = r + gamma * ahead - v
        for t in range(len(r)):
            decay = (gamma * lam) ** torch.arange(len(r) - t, dtype=v.dtype)
            assert own[t].item() == pytest.approx((decay * errors[t:]).sum().item())


def test_rewards_of_a_completion_sum_to_its_score_less_the_kl():
    rollout = random_rollout(4)
    d = rollout.logps - rollout.reference
    for c, rewards in enumerate(token_rewards(rollout, "k1").split(rollout.length.tolist())):
        expected = rollout.scores[c] - rollout.beta * d[rollout.owner == c].sum()
        assert rewards.sum().item() == pytest.approx(expected.item())
        assert rewards[:-1].tolist() == pytest.approx((-rollout.beta * d[rollout.owner == c][:-1]).tolist())


def test_without_beta_or_reference_rewards_are_the_scores_at_the_end():
    rollout = random_rollout(3)
    for free in (replace(rollout, beta=0.0), replace(rollout, reference=None), replace(rollout, logps=None, beta=0.0)):
        rewards = token_rewards(free, "k1")
        assert torch.equal(rewards[rollout.last], rollout.scores)
        assert rewards.count_nonzero() == len(rollout.scores)


def test_whitening_counts_what_is_kept_and_moves_all():
    g = torch.Generator().manual_seed(0)
    values, kept = torch.randn(50, generator=g, dtype=torch.float64) * 3 - 2, torch.arange(50) % 4 != 0
    for unbiased in (True, False):
        white = whiten(values, kept, unbiased=unbiased)
        assert white[kept].mean().item() == pytest.approx(0.0, abs=1e-12)
        assert white[kept].var(unbiased=unbiased).item() == pytest.approx(1.0)
        assert torch.equal(white.argsort(), values.argsort())
        mean = whiten(values, kept, keep_mean=True, unbiased=unbiased)[kept].mean()
        assert mean.item() == pytest.approx(values[kept].mean().item())
    assert torch.equal(whiten(values.where(kept, 1e3), kept)[kept], whiten(values, kept)[kept])


def test_whitening_one_value_gives_no_nan():
    one = torch.ones(1)
    assert whiten(one).tolist() == [0.0]
    assert whiten(torch.tensor([3.0, 5.0]), torch.tensor([True, False])).isfinite().all()


def test_groups_of_unequal_size():
    values = torch.tensor([1.0, 3.0, 5.0, 2.0, 8.0, 4.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 2, 2])
    assert group_mean(values, group).tolist() == [3.0, 3.0, 3.0, 2.0, 6.0, 6.0]
    assert group_std(values, group).tolist() == pytest.approx([2.0, 2.0, 2.0, 0.0, 8**0.5, 8**0.5])


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "cut"),
    [
        (2.0, 1.0, -2.0, 0),
        (2.0, 1.5, -2.6, 1),  # 1.3 at most: it is likely enough
        (2.0, 0.5, -1.0, 0),  # it has become rarer, and shall not
        (-2.0, 0.5, 1.6, 1),  # 0.8 at least: it is rare enough
        (-2.0, 1.5, 3.0, 0),
        (0.0, 3.0, 0.0, 0),
    ],
)
def test_clipping(advantage, ratio, loss, cut):
    policy = torch.log(torch.tensor([ratio], dtype=torch.float64)).requires_grad_()
    zero, weight = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    found, where = clipped(policy, zero, weight, 0.2, 0.3)
    found.sum().backward()
    assert found.item() == pytest.approx(loss)
    assert where.item() == cut
    assert policy.grad.item() == pytest.approx(0.0 if cut else -advantage * ratio)
