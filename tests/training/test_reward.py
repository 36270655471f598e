"""Reward models through the trainer: they learn, resume exactly, and their rewards do not depend on ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from align.logps import last_rewards, pack_examples
from align.training import checkpoint as ckpt
from align.training.rewards import completion_rewards
from tests.distributed.ranks import run_ranks
from tests.training.test_trainer import same, stop_at
from tests.training.worlds import Run, examples_of, fit, save_tiny_base

HEAD = {True: "base_model.model.score.weight", False: "score.weight"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_one_pack_equals_many(quantization, base, tmp_path):
    one = fit(0, 1, Run(base, tmp_path / "1", "reward", quantization, steps=2, pack_tokens=100_000))
    many = Run(base, tmp_path / "8", "reward", quantization, steps=2, pack_tokens=1, checkpointing=True)
    found = fit(0, 1, many)
    assert one["losses"] == pytest.approx(found["losses"], abs=1e-6)
    assert one["grad_norms"] == pytest.approx(found["grad_norms"], rel=1e-5)


@pytest.mark.parametrize("adapter", [True, False])
def test_training_learns_the_order_with_adapter_and_head(adapter, base, tmp_path):
    run = Run(base, tmp_path, "reward", steps=30, adapter=adapter, learning_rate=1e-2 if adapter else 1e-3)
    trainer = run.trainer()
    before = {name: t.clone() for name, t in trainer.model.trainable_state().items()}
    trainer.fit()
    log = [line["rewards/accuracy"] for line in trainer.state.log_history if "loss" in line]
    assert np.mean(log[-6:]) > np.mean(log[:6]) + 0.2
    moved = {name for name, t in trainer.final_state.items() if not torch.equal(t, before[name])}
    assert HEAD[adapter] in moved
    assert len(moved) == len(before)


@pytest.mark.parametrize("adapter", [True, False])
def test_resume_is_exact(adapter, base, tmp_path):
    run = Run(base, tmp_path / "whole", "reward", steps=6, save_every=2, adapter=adapter, validation=5)
    whole = fit(0, 1, run)
    cut = replace(run, work=tmp_path / "cut", parameter_hook=stop_at(5))
    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, cut)
    assert HEAD[adapter] in ckpt.read_trainable(cut.work / "checkpoints" / "step-000004")
    again = fit(0, 1, replace(cut, parameter_hook=None))
    assert again["resumed"] == 4
    assert same(whole["state"], again["state"])


def rewards_of(rank, world, run):
    """Rewards of uneven examples after training, and again with the weights that training began with."""
    trainer = run.trainer()
    examples = examples_of(trainer.step.method, 7, seed=3)
    before = {name: t.detach().clone() for name, t in trainer.model.trainable_state().items()}
    if any(t.numel() == 0 for t in before.values()):  # ZeRO-3 took a base trained in full apart while it was loaded
        before = ckpt.gather_trainable(trainer.model)
    trainer.fit()
    found = []
    for state in (trainer.final_state, before):
        ckpt.put_trainable(trainer.model, state)
        found.append(
            completion_rewards(trainer.model_wrapped, "reward", examples, run.pack_tokens, trainer.step.packing)
        )
    assert not trainer.model.training
    return found


@pytest.mark.parametrize(
    ("deepspeed", "adapter"), [("none", True), ("zero2", False), ("zero3", True), ("zero3", False)]
)
def test_rewards_are_those_of_one_process(deepspeed, adapter, base, tmp_path):
    pytest.importorskip("deepspeed")
    run = Run(base, tmp_path / "one", "reward", adapter=adapter, steps=2)
    expected = run_ranks(rewards_of, run, world=1)[0]
    examples = examples_of(run.trainer().step.method, 7, seed=3)
    assert [len(row) for row in expected[0]] == [len(e.completions) for e in examples]
    assert expected[0] != expected[1]
    two = replace(run, work=tmp_path / "two", deepspeed=deepspeed)
    for found in run_ranks(rewards_of, two, deepspeed=deepspeed != "none"):
        for ours, theirs in zip(found, expected, strict=True):
            for row, other in zip(ours, theirs, strict=True):
                assert row == pytest.approx(other, abs=1e-4)


def test_rewards_come_back_in_the_order_of_the_completions(base, tmp_path):
    trainer = Run(base, tmp_path, "reward").trainer()
    examples = examples_of(trainer.step.method, 6, seed=5)
    found = completion_rewards(trainer.model, "reward", examples, 64)
    for example, row in zip(examples, found, strict=True):
        for completion, reward in zip(example.completions, row, strict=True):
            (pack,) = pack_examples([replace(example, completions=(completion,))], 64)
            with torch.no_grad():
                assert float(trainer.model("reward", last_rewards, pack)) == pytest.approx(reward, abs=1e-5)
