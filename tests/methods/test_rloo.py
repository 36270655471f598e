from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align.methods.rloo import RLOO, rloo_advantages, rloo_loss
from align.types import RolloutLogps, map_logps
from tests.methods.rollouts import batch_of, random_rollout, rollout_of
from tests.methods.test_vectors import TOLERANCE
from tests.oracles.trl_rollouts import assert_rollout_equals_trl


def rloo(**settings) -> RLOO:
    return RLOO(**{"prompts": "p", "scorers": ["s"], "reference": "r"} | settings)


@pytest.mark.parametrize(
    ("normalise", "key"), [(False, "advantages"), (True, "advantages_normalised_trl")], ids=["plain", "normalised"]
)
def test_advantage_vectors(vectors, normalise, key):
    rollout = rollout_of(vectors["rloo"]["inputs"])
    found = rloo_advantages(rollout, rloo(normalise_advantages=normalise)).advantages
    assert found[rollout.last].tolist() == pytest.approx(vectors["rloo"]["expected"][key], abs=TOLERANCE)
    assert found.tolist() == found[rollout.last][rollout.owner].tolist()


@pytest.mark.parametrize(("ratio", "key"), [("none", "reinforce_loss_seq_sum"), ("sequence", "clipped_ratio_loss")])
def test_loss_vectors(vectors, ratio, key):
    inputs, expected = vectors["rloo"]["inputs"], vectors["rloo"]["expected"]
    config = rloo(ratio=ratio, clip=inputs["clip"])
    out = rloo_loss(batch_of(inputs, rloo_advantages(rollout_of(inputs), config).advantages), config)
    assert out.loss.item() == pytest.approx(expected[key], abs=TOLERANCE)


def test_where_it_was_drawn_the_loss_is_0_and_its_gradient_that_of_reinforce(vectors):
    inputs = vectors["rloo"]["inputs"] | {"new_logps": vectors["rloo"]["inputs"]["old_logps"]}
    gradients = []
    for ratio in ("sequence", "none"):
        config = rloo(ratio=ratio, clip=inputs["clip"])
        batch = batch_of(inputs, rloo_advantages(rollout_of(inputs), config).advantages)
        batch.policy.requires_grad_()
        out = rloo_loss(batch, config)
        out.loss.backward()
        gradients.append(batch.policy.grad)
        if ratio == "sequence":
            expected = vectors["rloo"]["expected"]["clipped_ratio_loss_at_ratio_1"]
            assert out.loss.item() == pytest.approx(expected, abs=TOLERANCE)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("normalise", [False, True])
def test_against_trl(tmp_path, normalise, beta):
    settings = {"normalise_advantages": normalise}
    assert_rollout_equals_trl(tmp_path, "rloo", settings, beta=beta, normalize_advantages=normalise)


def test_each_baseline_is_the_mean_of_the_others():
    rollout = replace(random_rollout(4), beta=0.0)
    found = rloo_advantages(rollout, rloo()).advantages[rollout.last]
    for c, prompt in enumerate(rollout.prompt):
        others = [rollout.scores[j] for j in range(len(found)) if rollout.prompt[j] == prompt and j != c]
        assert found[c].item() == pytest.approx((rollout.scores[c] - torch.stack(others).mean()).item())


def test_ratios_of_long_completions_are_exact_in_fp32():
    g = torch.Generator().manual_seed(0)
    length = torch.tensor([4000, 2500])
    old = -torch.rand(6500, generator=g) * 4
    new = old + torch.randn(6500, generator=g) * 1e-3
    owner = torch.arange(2).repeat_interleave(length)
    batch = RolloutLogps(new, old, torch.tensor([1.0, -1.0])[owner], owner, length, torch.ones(2))
    exact = map_logps(batch, lambda t: t.double() if t.is_floating_point() else t)
    found = [rloo_loss(each, rloo(clip=3.0)).terms["policy"].sum for each in (batch, exact)]
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-6, atol=0)
