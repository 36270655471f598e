"""Examples that are too large for policy and critic at once: each role is trained on them in its turn."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from align.training.rollout_step import CRITIC, POLICY, OneRole
from tests.training.worlds import Run, fit, save_tiny_base

ENTROPY = {"entropy_weight": 0.1, "epochs_per_rollout": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def logged(run: Run) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run.work / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(("policy/", "value/"))} for line in lines if "loss" in line]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_turns_or_at_once_is_the_same(base, tmp_path, checkpointing):
    run = Run(base, tmp_path / "at-once", "ppo", settings=ENTROPY, quantization="nf4", checkpointing=checkpointing)
    at_once = fit(0, 1, run)
    turns = replace(run, work=tmp_path / "turns", pack_tokens=20)  # some examples are larger than 10 tokens, some not
    in_turns = fit(0, 1, turns)
    assert in_turns["losses"] == pytest.approx(at_once["losses"], abs=2e-5)
    assert in_turns["grad_norms"] == pytest.approx(at_once["grad_norms"], rel=1e-3)
    ours, theirs = (np.concatenate([t.ravel() for t in each["state"].values()]) for each in (in_turns, at_once))
    assert np.linalg.norm(ours - theirs) < 5e-4 * np.linalg.norm(theirs)
    for ours, theirs in zip(logged(turns), logged(run), strict=True):
        assert ours.keys() == theirs.keys() >= {"policy/entropy", "value/loss", "value/clip_fraction"}
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_pack_in_turns_has_the_terms_and_the_gradient_of_its_role(base, tmp_path):
    trainer = Run(base, tmp_path, "ppo", settings=ENTROPY, pack_tokens=20).trainer()
    model, step = trainer.model, trainer.step
    trainer.online.prepare(model, 0, step)
    examples = trainer.online.examples(0, range(5))
    packs = step.packs(examples)
    taken = [each for each in packs if isinstance(each, OneRole)]
    assert taken
    assert [each.role for each in taken] == [POLICY, CRITIC] * (len(taken) // 2)
    assert all(each.tokens > 10 for each in taken)
    assert all(each.tokens <= 10 for each in packs if not isinstance(each, OneRole))
    assert step.weights(examples, packs) == step.weights(examples, replace(step, pack_tokens=10_000).packs(examples))
    terms = {POLICY: {"policy", "entropy"}, CRITIC: {"value"}}
    for pack in taken[:2]:
        model.zero_grad()
        output = step.terms(model, pack, examples)
        assert output.terms.keys() == terms[pack.role]
        sum(term.sum.sum() for term in output.terms.values()).backward()
        for role in (POLICY, CRITIC):
            gradients = [t.grad for t in model.tensors(role).values()]
            assert all(g is not None for g in gradients), "every trained parameter takes part on every rank"
            assert any(bool(g.any()) for g in gradients) == (role == pack.role)
