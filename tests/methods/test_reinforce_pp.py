from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align.methods.ops import token_rewards
from align.methods.reinforce_pp import ReinforcePP, reinforce_pp_advantages, reinforce_pp_loss
from tests.methods.rollouts import batch_of, ragged, random_rollout, rollout_of
from tests.methods.test_vectors import TOLERANCE


def reinforce(**settings) -> ReinforcePP:
    return ReinforcePP(**{"prompts": "p", "scorers": ["s"], "reference": "r", "completions": 4} | settings)


VECTORS = {"none": "reinforce_plus_plus", "group": "reinforce_plus_plus_baseline"}


@pytest.mark.parametrize(("unbiased", "key"), [(True, "advantages_unbiased_var"), (False, "advantages_biased_var")])
@pytest.mark.parametrize("baseline", ["none", "group"])
def test_advantage_vectors(vectors, baseline, unbiased, key):
    vector = vectors[VECTORS[baseline]]
    mask = vector["inputs"]["mask"]
    config = reinforce(baseline=baseline, unbiased_variance=unbiased)
    found = reinforce_pp_advantages(rollout_of(vector["inputs"]), config).advantages
    assert found.tolist() == pytest.approx(ragged(vector["expected"][key], mask).tolist(), abs=TOLERANCE)


def test_the_vector_of_rewards(vectors):
    vector = vectors["reinforce_plus_plus"]
    expected = ragged(vector["expected"]["token_rewards"], vector["inputs"]["mask"]).tolist()
    assert token_rewards(rollout_of(vector["inputs"]), "k1").tolist() == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("aggregation", "key"), [("token_mean", "loss_token_mean"), ("sequence_mean", "loss_seq_mean_token_mean")]
)
def test_loss_vectors(vectors, aggregation, key):
    """The numbers of the vector go with the biased variance."""
    inputs, expected = vectors["reinforce_plus_plus"]["inputs"], vectors["reinforce_plus_plus"]["expected"]
    config = reinforce(aggregation=aggregation, clip=inputs["clip"], unbiased_variance=False)
    batch = batch_of(inputs, reinforce_pp_advantages(rollout_of(inputs), config).advantages)
    assert reinforce_pp_loss(batch, config).loss.item() == pytest.approx(expected[key], abs=TOLERANCE)


def test_the_loss_vector_with_a_baseline(vectors):
    vector = vectors["reinforce_plus_plus_baseline"]
    inputs, expected = vector["inputs"], vector["expected"]
    config = reinforce(baseline="group", clip=inputs["clip"], beta=inputs["kl_coef"], unbiased_variance=False)
    out = reinforce_pp_loss(batch_of(inputs, reinforce_pp_advantages(rollout_of(inputs), config).advantages), config)
    kl = out.terms["kl"]
    assert out.terms["policy"].value.item() == pytest.approx(expected["policy_loss_token_mean"], abs=TOLERANCE)
    assert (kl.value / kl.coefficient).item() == pytest.approx(expected["k2_token_mean"], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected["total_token_mean"], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("aggregation", "key"), [("token_mean", "loss_token_mean"), ("sequence_mean", "loss_seq_mean_token_mean")]
)
def test_both_aggregations_of_the_clipped_loss(vectors, aggregation, key):
    vector = vectors["ppo_policy_loss"]
    advantages = ragged(vector["inputs"]["advantages"], vector["inputs"]["mask"])
    config = reinforce(aggregation=aggregation, clip=vector["inputs"]["clip"])
    out = reinforce_pp_loss(batch_of(vector["inputs"], advantages), config)
    assert out.loss.item() == pytest.approx(vector["expected"][key], abs=TOLERANCE)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_advantages_are_discounted_sums_of_what_is_to_come(gamma):
    """Before they are normalised, which keeps their differences in proportion."""
    rollout = random_rollout(3)
    rewards = token_rewards(rollout, "k1").split(rollout.length.tolist())
    sums = [gamma ** torch.arange(len(r) - t, dtype=r.dtype) @ r[t:] for r in rewards for t in range(len(r))]
    expected = torch.stack(sums)
    kept = expected[rollout.kept_tokens]
    found = reinforce_pp_advantages(rollout, reinforce(gamma=gamma)).advantages
    torch.testing.assert_close(found, (expected - kept.mean()) / torch.sqrt(kept.var() + 1e-8))


def test_long_completions_weigh_more_in_the_normalisation():
    """The mean is one over tokens: of two completions with scores 1 and 0, three tokens and one, it is 3/4."""
    rollout = replace(random_rollout(1), beta=0.0, scores=torch.tensor([1.0, 0.0], dtype=torch.float64))
    rollout = replace(rollout, length=torch.tensor([3, 1]), prompt=torch.tensor([0, 1]), kept=torch.ones(2).bool())
    found = reinforce_pp_advantages(rollout, reinforce(unbiased_variance=False)).advantages
    assert found.tolist() == pytest.approx([0.25 / (3 / 16) ** 0.5] * 3 + [-0.75 / (3 / 16) ** 0.5])


def test_with_a_baseline_the_level_of_a_prompts_scores_does_not_matter():
    rollout = random_rollout(4)
    level = torch.tensor([5.0, -3.0, 0.0, 11.0], dtype=torch.float64)[rollout.prompt]
    moved = replace(rollout, scores=rollout.scores + level)
    found = [reinforce_pp_advantages(each, reinforce(baseline="group")).advantages for each in (rollout, moved)]
    torch.testing.assert_close(*found)
    plain = [reinforce_pp_advantages(each, reinforce()).advantages for each in (rollout, moved)]
    assert not torch.allclose(*plain, atol=0.1)


def test_a_baseline_needs_completions_to_compare():
    with pytest.raises(ValueError, match="completions: 2"):
        reinforce(baseline="group", completions=1)
    assert reinforce(baseline="none", completions=1).completions == 1
