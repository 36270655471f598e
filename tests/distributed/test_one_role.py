"""Ranks that train policy and critic in turns beside ranks that train them at once."""

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
