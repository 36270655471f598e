from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from align.methods.grpo import GRPO, grpo_advantages, grpo_loss
from tests.methods.rollouts import batch_of, random_rollout, rollout_of
from tests.methods.test_vectors import TOLERANCE
from tests.oracles.trl_rollouts import LONGEST, assert_rollout_equals_trl

DR_GRPO = {"scale": "none", "aggregation": "constant", "generation": {"max_new_tokens": 16}}


def grpo(**settings) -> GRPO:
    return GRPO(**{"prompts": "p", "scorers": ["s"], "reference": "r"} | settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("grpo_loss", {}), ("grpo_token_mean_dapo_bnpo", {"aggregation": "token_mean"}), ("dr_grpo", DR_GRPO)],
)
@pytest.mark.parametrize(
    ("expected", "more"),
    [("loss", {}), ("loss_kl_times_ratio", {"kl_ratio": True}), ("loss_without_kl", {"beta": 0.0})],
)
def test_loss_vectors(vectors, name, settings, expected, more):
    inputs, numbers = vectors[name]["inputs"], vectors[name]["expected"]
    config = grpo(**{"clip": inputs["clip"], "beta": inputs["kl_coef"]} | settings | more)
    batch = batch_of(inputs, grpo_advantages(rollout_of(inputs), config).advantages)
    assert grpo_loss(batch, config).loss.item() == pytest.approx(numbers[expected], abs=TOLERANCE)


@pytest.mark.parametrize(("scale", "key"), [("std", "unbiased_std"), ("none", "mean_only")])
def test_advantage_vectors(vectors, scale, key):
    inputs, expected = vectors["grpo_advantages"]["inputs"], vectors["grpo_advantages"]["expected"]
    rollout = rollout_of(inputs | {"mask": [[1, 1], [1, 0], [1, 1], [1, 0]]})
    found = grpo_advantages(rollout, grpo(scale=scale)).advantages
    assert found[rollout.last].tolist() == pytest.approx(expected[key], abs=TOLERANCE)
    assert found.tolist() == found[rollout.last][rollout.owner].tolist()


def test_the_loss_with_the_biased_deviation_is_another(vectors):
    """Of papers that do not say which they take, the number tells."""
    inputs = vectors["grpo_loss"]["inputs"]
    advantages = torch.tensor(vectors["grpo_advantages"]["expected"]["biased_std"], dtype=torch.float64)
    batch = batch_of(inputs, advantages[rollout_of(inputs).owner])
    loss = grpo_loss(batch, grpo(clip=inputs["clip"], beta=inputs["kl_coef"])).loss.item()
    assert loss == pytest.approx(vectors["grpo_loss"]["expected"]["loss_biased_std"], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "trl_settings"),
    [
        ({}, {"loss_type": "grpo", "use_bias_correction_kl": False}),
        ({"kl_ratio": True}, {"loss_type": "grpo"}),
        ({"scale": "none"}, {"loss_type": "grpo", "use_bias_correction_kl": False, "scale_rewards": "none"}),
        ({"aggregation": "token_mean", "kl_ratio": True}, {"loss_type": "dapo"}),
        ({"aggregation": "token_mean", "kl_ratio": True}, {"loss_type": "bnpo"}),
        (DR_GRPO | {"kl_ratio": True}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
        (
            {"clip": 0.1, "clip_high": 0.28, "kl_ratio": True},
            {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.28},
        ),
        ({"entropy_weight": 0.3, "kl_ratio": True}, {"loss_type": "grpo", "entropy_coef": 0.3}),
    ],
)
def test_against_trl(tmp_path, settings, trl_settings):
    assert_rollout_equals_trl(tmp_path, "grpo", settings, **trl_settings)


def test_without_a_kl_against_trl(tmp_path):
    assert_rollout_equals_trl(tmp_path, "grpo", {}, beta=0.0, loss_type="grpo")


@pytest.mark.parametrize(
    ("settings", "loss_type"),
    [({"aggregation": "token_mean"}, "dapo"), ({}, "grpo"), (DR_GRPO | {"scale": "std"}, "dr_grpo")],
)
def test_dropped_completions_against_trl(tmp_path, settings, loss_type):
    assert_rollout_equals_trl(
        tmp_path, "grpo", settings | {"kl_ratio": True}, dropped=True, loss_type=loss_type,
        mask_truncated_completions=True,
    )  # fmt: skip


def test_prompts_without_differences_teach_nothing():
    rollout = random_rollout(4)
    equal = replace(rollout, scores=torch.tensor([0.3, 0.1, -2.0, 7.0], dtype=torch.float64)[rollout.prompt])
    for scale in ("std", "none"):
        assert grpo_advantages(equal, grpo(scale=scale)).advantages.abs().max() < 1e-9


def test_scale_and_level_of_scores_do_not_matter_with_the_deviation():
    """But for the 1e-4 that is added to it."""
    rollout = random_rollout(4)
    moved = replace(rollout, scores=rollout.scores * 3 + 11)
    found = [grpo_advantages(each, grpo()).advantages for each in (rollout, moved)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=0)


def test_length_weighs_as_the_aggregation_says():
    """The gradient of one token of a completion: over its own length, over all tokens, over a constant."""
    inputs = {"mask": [[1, 1, 1, 1], [1, 0, 0, 0]], "old_logps": [[-1.0] * 4] * 2, "new_logps": [[-1.0] * 4] * 2}
    ones = torch.ones(5, dtype=torch.float64)
    for aggregation, expected in (
        ("sequence_mean", [1 / 8, 1 / 2]),
        ("token_mean", [0.2] * 2),
        ("constant", [1 / 32] * 2),
    ):
        batch = batch_of(inputs, ones)
        batch.policy.requires_grad_()
        config = grpo(reference=None, aggregation=aggregation, generation={"max_new_tokens": LONGEST})
        grpo_loss(batch, config).loss.backward()
        assert (-batch.policy.grad[[0, 4]]).tolist() == pytest.approx(expected)
