from __future__ import annotations

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from align.methods.reward import Reward, reward_loss
from align.types import RankedRewards
from tests.methods.batches import random_rewards
from tests.methods.test_vectors import TOLERANCE


def ranked(rewards: list[list[float]], scores: list[list[float]], margin: list[float] | None = None) -> RankedRewards:
    flat = lambda rows: torch.tensor([v for row in rows for v in row], dtype=torch.float64)  # noqa: E731
    owner = torch.tensor([b for b, row in enumerate(rewards) for _ in row])
    ones = torch.ones(len(rewards), dtype=torch.float64)
    return RankedRewards(flat(rewards), flat(scores), owner, ones, 0 * ones if margin is None else torch.tensor(margin))


def pairs_of(inputs: dict) -> RankedRewards:
    rows = [list(pair) for pair in zip(inputs["chosen_rewards"], inputs["rejected_rewards"], strict=True)]
    return ranked(rows, [[1.0, 0.0]] * len(rows), inputs.get("margin"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("rm_bradley_terry", {}), ("rm_bradley_terry_margin", {"margin": "column"})],
)
def test_pairs(vectors, name, settings):
    inputs, expected = vectors[name]["inputs"], vectors[name]["expected"]
    out = reward_loss(pairs_of(inputs), Reward(data="d", **settings))
    assert out.terms["loss"].sum.tolist() == pytest.approx(expected["per_pair"], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected["mean"], abs=TOLERANCE)
    if "accuracy" in expected:
        assert out.metrics["rewards/accuracy"].value.item() == pytest.approx(expected["accuracy"], abs=TOLERANCE)


def test_centring(vectors):
    inputs, expected = vectors["rm_bradley_terry_centered"]["inputs"], vectors["rm_bradley_terry_centered"]["expected"]
    out = reward_loss(pairs_of(inputs), Reward(data="d", centring=inputs["center_coefficient"]))
    assert out.loss.item() == pytest.approx(expected["loss"], abs=TOLERANCE)


def test_kwise(vectors):
    inputs, expected = (vectors["rm_kwise_instructgpt"][key] for key in ("inputs", "expected"))
    batch = ranked(inputs["rewards"], inputs["ranks_higher_is_better"])
    out = reward_loss(batch, Reward(data="d"))
    assert out.terms["loss"].sum.tolist() == pytest.approx(expected["per_prompt_mean"], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected["loss_prompt_mean"], abs=TOLERANCE)
    n_pairs = torch.tensor(expected["n_pairs"])
    flat = (out.terms["loss"].sum * n_pairs).sum() / n_pairs.sum()
    assert flat.item() == pytest.approx(expected["loss_flat_pair_mean"], abs=TOLERANCE)
    choose = torch.tensor([math.comb(len(row), 2) for row in inputs["rewards"]])
    literal = out.terms["loss"].sum * n_pairs / choose
    assert literal.tolist() == pytest.approx(expected["per_prompt_literal_eq1_choose_k2"], abs=TOLERANCE)


def looped(batch: RankedRewards, config: Reward) -> float:
    """The equation in loops over prompts and pairs."""
    total = weight = 0.0
    for b in range(len(batch.weight)):
        own = [c for c in range(len(batch.rewards)) if batch.prompt[c] == b]
        losses = []
        for i, j in itertools.permutations(own, 2):
            if not batch.scores[i] > batch.scores[j]:
                continue
            wanted = {"none": 0.0, "column": batch.margin[b], "score": batch.scores[i] - batch.scores[j]}[config.margin]
            r_i, r_j = float(batch.rewards[i]), float(batch.rewards[j])
            losses.append(math.log1p(math.exp(-(r_i - r_j - wanted))) + config.centring * (r_i + r_j) ** 2)
        if losses:
            total += float(batch.weight[b]) * sum(losses) / len(losses)
            weight += float(batch.weight[b])
    return total / weight


@pytest.mark.parametrize("margin", ["none", "column", "score"])
@pytest.mark.parametrize("centring", [0.0, 0.01])
def test_against_loops(margin, centring):
    batch, config = random_rewards(9, 0), Reward(data="d", margin=margin, centring=centring)
    assert reward_loss(batch, config).loss.item() == pytest.approx(looped(batch, config), rel=1e-9)


@pytest.mark.parametrize(("margin", "centring"), [("none", 0.0), ("column", 0.0), ("column", 0.01)])
def test_against_trl(margin, centring):
    """Its trainer's loss on given rewards of pairs, with gradients."""
    trl = pytest.importorskip("trl", reason="TRL is an extra: pip install align[trl]")
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(2, 5, generator=g, dtype=torch.float64, requires_grad=True)
    extra = torch.rand(5, generator=g, dtype=torch.float64)
    gathered = SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
        accelerator=gathered, args=SimpleNamespace(center_rewards_coefficient=centring or None),
    )  # fmt: skip
    inputs = {"margin": extra} if margin == "column" else {}
    logits = SimpleNamespace(logits=rewards.flatten()[:, None])
    expected = trl.RewardTrainer.compute_loss(trainer, lambda **_: logits, inputs)
    wanted = torch.autograd.grad(expected, rewards)[0]
    owner, scores = torch.arange(5).repeat_interleave(2), torch.tensor([1.0, 0.0]).repeat(5)
    batch = RankedRewards(rewards.T.reshape(-1), scores, owner, torch.ones(5), extra)
    loss = reward_loss(batch, Reward(data="d", margin=margin, centring=centring)).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, rewards)[0], wanted)


def test_without_margin_and_centring_a_shift_of_all_rewards_changes_nothing():
    batch = random_rewards(6, 1)
    moved = RankedRewards(batch.rewards + 3.0, batch.scores, batch.prompt, batch.weight, batch.margin)
    for centring, same in ((0.0, True), (0.1, False)):
        config = Reward(data="d", centring=centring)
        before, after = reward_loss(batch, config).loss.item(), reward_loss(moved, config).loss.item()
        assert (before == pytest.approx(after)) is same


def test_a_prompt_of_ties_counts_for_nothing():
    out = reward_loss(ranked([[0.5, -0.5], [2.0, 1.0]], [[1.0, 1.0], [1.0, 0.0]]), Reward(data="d", centring=0.1))
    assert out.terms["loss"].weight.tolist() == [0.0, 1.0]
    assert out.metrics["rewards/accuracy"].value.item() == 1.0
    alone = reward_loss(ranked([[0.5, -0.5]], [[1.0, 1.0]]), Reward(data="d"))
    assert alone.loss.item() == 0.0
