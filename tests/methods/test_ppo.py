from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from align.methods import get_method
from align.methods.ppo import PPO, ppo_advantages, ppo_loss
from align.types import Rollout, RolloutLogps
from tests.methods.rollouts import batch_of, learnt, padded, ragged, random_rollout, rollout_of
from tests.methods.test_vectors import TOLERANCE


def ppo(**settings) -> PPO:
    return PPO(**{"prompts": "p", "scorers": ["s"], "reference": "r"} | settings)


# --- vectors ---------------------------------------------------------------------------------------------------------


def batch_of_vectors(vectors) -> RolloutLogps:
    """What the two vectors of the losses have, which are of the same tokens."""
    policy, critic = vectors["ppo_policy_loss"]["inputs"], vectors["ppo_value_loss"]["inputs"]
    of_critic = {"values": "value_preds", "old_values": "old_values", "returns": "returns"}
    said = {name: ragged(critic[key], critic["mask"]) for name, key in of_critic.items()}
    return batch_of(policy, ragged(policy["advantages"], policy["mask"]), **said)


def test_advantages_from_scores_to_whitening(vectors):
    """Token rewards, estimate and whitening are three vectors of one rollout."""
    values, mask = vectors["ppo_gae"]["inputs"]["values"], vectors["ppo_gae"]["inputs"]["mask"]
    rollout = rollout_of(vectors["ppo_token_rewards_k1"]["inputs"], values=ragged(values, mask))
    for whitened, expected in (
        (False, vectors["ppo_gae"]["expected"]["advantages"]),
        (True, vectors["ppo_whiten"]["expected"]["adv_whitened_unbiased_var"]),
    ):
        found = ppo_advantages(rollout, ppo(lam=0.95, whiten_advantages=whitened))
        assert found.advantages.tolist() == pytest.approx(ragged(expected, mask).tolist(), abs=TOLERANCE)
        returns = ragged(vectors["ppo_gae"]["expected"]["returns"], mask)
        assert found.returns.tolist() == pytest.approx(returns.tolist(), abs=TOLERANCE)


def test_the_policy_loss(vectors):
    inputs, expected = vectors["ppo_policy_loss"]["inputs"], vectors["ppo_policy_loss"]["expected"]
    out = ppo_loss(batch_of_vectors(vectors), ppo(clip=inputs["clip"]))
    assert out.terms["policy"].value.item() == pytest.approx(expected["loss_token_mean"], abs=TOLERANCE)
    assert out.metrics["policy/clip_fraction"].value.item() == pytest.approx(expected["clip_fraction"], abs=TOLERANCE)
    assert out.metrics["policy/approx_kl"].value.item() == pytest.approx(expected["approx_kl_half_sq"], abs=TOLERANCE)


def test_the_value_loss(vectors):
    inputs, expected = vectors["ppo_value_loss"]["inputs"], vectors["ppo_value_loss"]["expected"]
    for clip, key in ((inputs["clip_value"], "loss_clipped"), (None, "loss_unclipped")):
        out = ppo_loss(batch_of_vectors(vectors), ppo(value_clip=clip))
        value = out.terms["value"]
        assert (value.value / value.coefficient).item() == pytest.approx(expected[key], abs=TOLERANCE)
        assert out.metrics["value/loss"].value.item() == pytest.approx(expected[key], abs=TOLERANCE)


def test_the_total(vectors):
    inputs, expected = vectors["ppo_total_loss"]["inputs"], vectors["ppo_total_loss"]["expected"]
    out = ppo_loss(batch_of_vectors(vectors), ppo(clip=0.2, value_clip=0.2, value_weight=inputs["vf_coef"]))
    assert out.loss.item() == pytest.approx(expected["total"], abs=TOLERANCE)


def test_the_score_stands_on_the_last_token(vectors):
    """And not one step behind it, where another convention has it: the difference is that of the vector."""
    inputs, expected = vectors["ppo_score_placement"]["inputs"], vectors["ppo_score_placement"]["expected"]
    rows = {key: [inputs[key]] for key in ("logps", "ref_logps")} | {"values": [inputs["values"][:3]]}
    rollout = rollout_of(rows | {"mask": [[1, 1, 1]], "scores": [inputs["score"]], "kl_coef": inputs["kl_coef"]})
    config = ppo(gamma=inputs["gamma"], lam=inputs["lam"], whiten_advantages=False)
    found = ppo_advantages(rollout, config).advantages
    assert found.tolist() == pytest.approx(expected["advantages_score_on_last_token"], abs=TOLERANCE)
    behind = torch.tensor(expected["advantages_score_one_step_later"][:3], dtype=torch.float64)
    assert (found - behind).tolist() == pytest.approx(expected["difference_first_three"], abs=2 * TOLERANCE)


# --- a second implementation: the equations on padded rows, by loops and without any shared function ------------------


def padded_advantages(rollout: Rollout, config: PPO) -> tuple[Tensor, Tensor]:
    """[C, T] advantages and returns."""
    logps, reference, values = (padded(t, rollout.length) for t in (rollout.logps, rollout.reference, rollout.values))
    count, width = logps.shape
    inside = torch.arange(width)[None, :] < rollout.length[:, None]
    counted = inside & rollout.kept[:, None]
    ratio = torch.exp(reference - logps)
    kl = {"k1": -torch.log(ratio), "k2": torch.log(ratio) ** 2 / 2, "k3": ratio - 1 - torch.log(ratio)}
    rewards = -rollout.beta * kl[config.kl_estimator]
    for c in range(count):
        rewards[c, rollout.length[c] - 1] += rollout.scores[c]
    if config.whiten_rewards:
        mean, deviation = rewards[counted].mean(), rewards[counted].std()
        rewards = (rewards - mean) / deviation + mean
    advantages = torch.zeros_like(rewards)
    for c in range(count):
        n = int(rollout.length[c])
        for t in range(n):
            for s in range(t, n):
                ahead = values[c, s + 1] if s + 1 < n else 0.0
                error = rewards[c, s] + config.gamma * ahead - values[c, s]
                advantages[c, t] += (config.gamma * config.lam) ** (s - t) * error
    returns = advantages + values
    if config.whiten_advantages:
        advantages = (advantages - advantages[counted].mean()) / advantages[counted].std()
    return advantages, returns


def padded_loss(batch: RolloutLogps, config: PPO) -> Tensor:
    names = ("policy", "old", "advantages", "entropy", "values", "old_values", "returns")
    row = {name: padded(getattr(batch, name), batch.length) for name in names}
    mask = padded(batch.weight[batch.owner], batch.length)
    mean = lambda values: (values * mask).sum() / mask.sum()  # noqa: E731
    ratio = torch.exp(row["policy"] - row["old"])
    bounded = ratio.clamp(1 - config.clip, 1 + config.clip)
    loss = -mean(torch.minimum(row["advantages"] * ratio, row["advantages"] * bounded))
    error = (row["values"] - row["returns"]) ** 2
    if config.value_clip is not None:
        step = (row["values"] - row["old_values"]).clamp(-config.value_clip, config.value_clip)
        error = torch.maximum(error, (row["old_values"] + step - row["returns"]) ** 2)
    return loss + config.value_weight * 0.5 * mean(error) - config.entropy_weight * mean(row["entropy"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gamma": 0.9, "lam": 0.7},
        {"whiten_rewards": True, "kl_estimator": "k3"},
        {"whiten_advantages": False, "kl_estimator": "k2", "value_clip": None},
        {"clip": 0.1, "value_clip": 0.05, "value_weight": 0.7, "entropy_weight": 0.2},
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_against_a_second_implementation(settings, seed):
    config, rollout = ppo(**settings), random_rollout(4, seed)
    found, (advantages, returns) = ppo_advantages(rollout, config), padded_advantages(rollout, config)
    inside = torch.arange(advantages.shape[1])[None, :] < rollout.length[:, None]
    torch.testing.assert_close(found.advantages, advantages[inside], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.returns, returns[inside], rtol=1e-7, atol=1e-7)
    batch = learnt(get_method("ppo"), rollout, config, seed)
    gradients = []
    for loss in (lambda b: ppo_loss(b, config).loss, lambda b: padded_loss(b, config)):
        own = replace(batch, **{n: getattr(batch, n).clone().requires_grad_() for n in ("policy", "values", "entropy")})
        value = loss(own)
        value.backward()
        entropy = torch.zeros_like(own.entropy) if own.entropy.grad is None else own.entropy.grad
        gradients.append((value.detach(), own.policy.grad, own.values.grad, entropy))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# --- properties ------------------------------------------------------------------------------------------------------


def test_advantages_of_a_rollout_have_mean_0_and_variance_1():
    rollout = random_rollout(6)
    found = ppo_advantages(rollout, ppo())
    kept = found.advantages[rollout.kept_tokens]
    assert kept.mean().item() == pytest.approx(0.0, abs=1e-12)
    assert kept.var().item() == pytest.approx(1.0)
    assert torch.equal(found.returns, ppo_advantages(rollout, ppo(whiten_advantages=False)).returns)


def test_a_critic_that_knows_the_outcome_leaves_nothing_to_learn():
    rollout = replace(random_rollout(4), beta=0.0)
    knowing = replace(rollout, values=rollout.scores[rollout.owner])
    found = ppo_advantages(knowing, ppo(whiten_advantages=False))
    assert found.advantages.abs().max() < 1e-12
    torch.testing.assert_close(found.returns, knowing.values)


def test_a_critic_that_has_moved_far_towards_its_returns_is_held():
    """Its gradient is cut off beyond the clip, and not on the way back."""
    one = torch.ones(4, dtype=torch.float64)
    values = torch.tensor([0.1, 0.5, 0.9, -0.5], dtype=torch.float64).requires_grad_()
    batch = RolloutLogps(
        -one, -one, one, torch.arange(4), torch.ones(4).long(), one,
        values=values, old_values=0 * one, returns=one,
    )  # fmt: skip
    out = ppo_loss(batch, ppo(value_weight=4.0))
    out.loss.backward()
    assert values.grad.tolist() == pytest.approx([0.1 - 1, 0.0, 0.0, -0.5 - 1])
    assert out.metrics["value/clip_fraction"].value.item() == pytest.approx(0.5)
