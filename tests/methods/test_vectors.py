"""Losses against numbers that were computed by hand and by at least one other implementation."""

from __future__ import annotations

import pytest
import torch

from align.logps.pack import Pack
from align.methods.dpo import DPO, dpo_loss
from align.methods.ppo import PPO
from align.methods.pretrain import Pretrain, pretrain_loss
from align.methods.sft import SFT, sft_loss
from align.training.online import steered
from align.types import Logps, PairedLogps, TokensLogps

TOLERANCE = 1.5e-6


def paired(inputs) -> PairedLogps:
    as64 = lambda key: torch.tensor(inputs[key], dtype=torch.float64)  # noqa: E731
    n = len(inputs["policy_chosen_logps"])
    lengths = [
        torch.tensor(inputs.get(f"{side}_lengths", [1] * n), dtype=torch.float64) for side in ("chosen", "rejected")
    ]

    def rows(who: str) -> list[Logps]:
        sides = zip(("chosen", "rejected"), lengths, strict=True)
        return [Logps(as64(f"{who}_{side}_logps"), length) for side, length in sides]

    weight = torch.ones(n, dtype=torch.float64)
    frozen = PairedLogps(*rows("ref"), weight) if "ref_chosen_logps" in inputs else None
    return PairedLogps(*rows("policy"), weight, frozen)


def tokens(rows: list[list[float]]) -> TokensLogps:
    total = torch.tensor([sum(r) for r in rows], dtype=torch.float64)
    length = torch.tensor([len(r) for r in rows], dtype=torch.float64)
    return TokensLogps(Logps(total, length), torch.ones(len(rows), dtype=torch.float64))


def test_dpo_sigmoid(vectors):
    inputs, expected = vectors["dpo_sigmoid"]["inputs"], vectors["dpo_sigmoid"]["expected"]
    batch = paired(inputs)
    batch.chosen.total.requires_grad_()
    out = dpo_loss(batch, DPO(data="d", reference="r", beta=inputs["beta"]))
    out.terms["loss"].sum.sum().backward()
    assert out.loss.item() == pytest.approx(expected["mean"], abs=TOLERANCE)
    assert out.terms["loss"].sum.tolist() == pytest.approx(expected["per_example"], abs=TOLERANCE)
    assert out.metrics["rewards/chosen"].sum.tolist() == pytest.approx(expected["chosen_rewards"], abs=TOLERANCE)
    assert out.metrics["rewards/rejected"].sum.tolist() == pytest.approx(expected["rejected_rewards"], abs=TOLERANCE)
    assert out.metrics["rewards/accuracy"].value.item() == pytest.approx(expected["accuracy"], abs=TOLERANCE)
    assert batch.chosen.total.grad.tolist() == pytest.approx(expected["d_sum_loss_d_policy_chosen_logp"], abs=TOLERANCE)


def test_label_smoothing_is_read(vectors):
    inputs, expected = vectors["cdpo"]["inputs"], vectors["cdpo"]["expected"]
    config = DPO(data="d", reference="r", beta=inputs["beta"], label_smoothing=inputs["label_smoothing"])
    out = dpo_loss(paired(inputs), config)
    assert out.terms["loss"].sum.tolist() == pytest.approx(expected["per_example"], abs=TOLERANCE)
    assert out.loss.item() == pytest.approx(expected["mean"], abs=TOLERANCE)
    assert out.loss.item() != pytest.approx(vectors["dpo_sigmoid"]["expected"]["mean"], abs=1e-4)


@pytest.mark.parametrize(
    ("reduction", "key"), [("token_mean", "token_mean"), ("sequence_mean", "sequence_mean_of_token_means")]
)
def test_sft_reductions(vectors, reduction, key):
    vector = vectors["sft_reductions"]
    batch = tokens(vector["inputs"]["response_token_logps"])
    out = sft_loss(batch, SFT(data="d", reduction=reduction))
    assert out.loss.item() == pytest.approx(vector["expected"][key], abs=TOLERANCE)


def test_token_mean_is_not_the_mean_of_micro_batches(vectors):
    """Two micro-batches of one row: summing terms first gives 1.25, averaging their losses gives 1.5."""
    rows = vectors["sft_reductions"]["inputs"]["response_token_logps"]
    parts = [sft_loss(tokens([r]), SFT(data="d")).terms["loss"] for r in rows]
    exact = sum(p.sum.sum() for p in parts) / sum(p.weight.sum() for p in parts)
    naive = sum(p.value for p in parts) / len(parts)
    assert exact.item() == pytest.approx(vectors["sft_reductions"]["expected"]["token_mean"], abs=TOLERANCE)
    assert naive.item() == pytest.approx(
        vectors["sft_reductions"]["expected"]["naive_grad_accum_of_two_micro_batches"], abs=TOLERANCE
    )


def test_pretrain_is_the_token_mean(vectors):
    vector = vectors["sft_reductions"]
    batch = tokens(vector["inputs"]["response_token_logps"])
    assert pretrain_loss(batch, Pretrain(data="d")).loss.item() == pytest.approx(vector["expected"]["token_mean"])


def test_sequence_logps(vectors):
    """The pack's shift, mask and sums reproduce the hand-computed log-probabilities."""
    inputs, expected = vectors["sequence_logps"]["inputs"], vectors["sequence_logps"]["expected"]
    logits, labels = torch.tensor(inputs["logits"]), torch.tensor(inputs["labels"])
    row, column = (labels != -100).nonzero(as_tuple=True)
    width = labels.shape[1]
    pack = Pack(labels, row * width + column - 1, labels[row, column], row, row[:0], len(labels), (0, 1))
    states = logits.flatten(0, 1)[pack.positions]
    values = torch.log_softmax(states, -1).gather(1, pack.targets[:, None])[:, 0]
    logps = pack.sum_by_completion(values)
    assert logps.total.tolist() == pytest.approx(expected["sum_logps"], abs=TOLERANCE)
    assert logps.mean.tolist() == pytest.approx(expected["token_mean_logps"], abs=TOLERANCE)
    assert logps.length.tolist() == expected["n_scored"]


def test_beta_is_steered_to_the_target(vectors):
    inputs, found = vectors["adaptive_kl_controller"]["inputs"], []
    stage = PPO(prompts="p", scorers=["s"], reference="r", kl_target=inputs["target"], kl_horizon=inputs["horizon"])
    beta = inputs["init"]
    for kl, completions in inputs["updates"]:
        beta = steered(beta, kl, completions, stage)
        found.append(beta)
    assert found == pytest.approx(vectors["adaptive_kl_controller"]["expected"]["values"], abs=TOLERANCE)
