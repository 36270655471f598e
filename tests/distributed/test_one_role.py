"""Ranks that take policy and critic in turns, or learn from the pass that said what a rollout is worth."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.test_equivalence import distance
from tests.training.worlds import Run, fit, save_tiny_base

pytest.importorskip("deepspeed")


@pytest.mark.parametrize("deepspeed", ["none", "zero3"])
def test_in_turns_on_two_ranks_is_at_once_on_one(deepspeed, tmp_path):
    """Some examples are more than half of a pack of 20 tokens: ranks differ in packs and in how they take them."""
    base = save_tiny_base(tmp_path / "base")
    settings = {"epochs_per_rollout": 2, "ptx": "x"}
    run = Run(base, tmp_path / "one", "ppo", steps=3, settings=settings, texts=5)
    alone = run_ranks(fit, run, world=1)[0]
    two = replace(run, work=tmp_path / "two", deepspeed=deepspeed, pack_tokens=20, same_rollouts=run.work)
    for found in run_ranks(fit, two, deepspeed=deepspeed != "none"):
        assert found["losses"] == pytest.approx(alone["losses"], abs=2e-5)
        assert distance(alone["state"], found["state"]) < 2e-4


@pytest.mark.parametrize("deepspeed", ["none", "zero2", "zero3"])
def test_one_pack_of_each_rank_is_run_once(deepspeed, tmp_path):
    """Other prompts are drawn by a rank than it learns from: 3 and 2 of each, in another order."""
    base = save_tiny_base(tmp_path / "base")
    run = Run(base, tmp_path / "one", "ppo", steps=3, settings={"prompts_per_rollout": 5})
    alone = run_ranks(fit, run, world=1)[0]
    two = replace(run, work=tmp_path / "two", deepspeed=deepspeed, pack_tokens=100_000, same_rollouts=run.work)
    for found in run_ranks(fit, two, deepspeed=deepspeed != "none"):
        assert found["losses"] == pytest.approx(alone["losses"], abs=2e-5)
        assert found["online"]["values"] == pytest.approx(alone["online"]["values"], abs=1e-4)
        assert distance(alone["state"], found["state"]) < 2e-4
