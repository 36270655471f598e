"""Rollouts and what is learnt from them, in one process: scores, log-probabilities, updates, and what stops them."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from align.methods import all_methods, get_method
from align.training import online as making
from align.types import Batch, Needs
from tests.training.test_trainer import same, stop_at
from tests.training.worlds import Run, fit, save_tiny_base

KINDS = sorted(kind for kind, method in all_methods().items() if method.batch is Batch.ROLLOUT)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def lines(work) -> list[dict]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


# --- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_steps_and_tells_what_it_measured(kind, base, tmp_path):
    """Rollouts before the first and the fourth step, where policy and reference or old policy are still the same."""
    run = Run(base, tmp_path, kind, steps=4, settings={"scorers": ["x"], "weights": {"reward": 2.0, "x": 0.5}})
    trainer = run.trainer()
    before = {name: t.clone() for name, t in trainer.model.trainable_state().items()}
    trainer.fit()
    drawn = [line for line in lines(tmp_path) if "rollout/number" in line]
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert [(line["step"], line["rollout/number"]) for line in drawn] == [(0, 0), (3, 1)]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in drawn:
        assert line["rollout/score"] == pytest.approx(2 * line["score/reward"] + 0.5 * line["score/x"], abs=1e-5)
        assert 0 < line["rollout/ended"] < 1
        assert 1 <= line["rollout/length"] <= 6
        assert line["rollout/kl"] == pytest.approx(0, abs=1e-5) if line["step"] == 0 else abs(line["rollout/kl"]) > 1e-3
    for line in steps:
        assert np.isfinite(line["loss"])
        assert line["grad_norm"] > 0
        assert 0 < line["policy/entropy"] < np.log(300)
        fresh = line["step"] in (1, 4)
        assert line["policy/approx_kl"] < 1e-9 if fresh else line["policy/approx_kl"] > 1e-4
        assert (line["policy/clip_fraction"] == 0) or not fresh
    moved = {name.partition("/")[0] == "critic" for name, t in trainer.final_state.items() if not t.equal(before[name])}
    assert moved == ({True, False} if Needs.VALUES in get_method(kind).needs else {False})


@pytest.mark.parametrize("kind", KINDS)
def test_one_pack_equals_many(kind, base, tmp_path):
    run = Run(base, tmp_path / "1", kind, "nf4", steps=2, pack_tokens=100_000)
    one = fit(0, 1, run)
    many = fit(0, 1, replace(run, work=tmp_path / "8", pack_tokens=1, checkpointing=True))
    assert one["losses"] == pytest.approx(many["losses"], abs=2e-6)
    assert one["grad_norms"] == pytest.approx(many["grad_norms"], rel=1e-4)


def test_learning_raises_the_score(base, tmp_path):
    """A scorer that likes letters; no reference holds the policy back."""

    def likes_letters(trainer, rank):
        score = lambda prompt, said: float(sum("a" <= c <= "z" for c in said))  # noqa: E731
        trainer.online.judges.scorers["x"] = ("x", SimpleNamespace(score=score))

    settings = {"reward": None, "reference": None, "missing_eos": "keep", "completions": 12}
    run = Run(base, tmp_path, "grpo", steps=24, learning_rate=2e-2, parameter_hook=likes_letters)
    fit(0, 1, replace(run, settings=settings | {"generation": {"max_new_tokens": 6}}))
    scores = [line["rollout/score"] for line in lines(tmp_path) if "rollout/score" in line]
    assert np.mean(scores[-2:]) > np.mean(scores[:2]) + 1.5


def test_a_policy_that_has_moved_far_enough_waits_for_the_next_rollout(base, tmp_path):
    """The second update of a rollout finds that the first went too far: it is the last, and the third is left out."""
    run = Run(base, tmp_path / "whole", "grpo", steps=6, settings={"stop_kl": 1e-6})
    whole = fit(0, 1, run)
    two = fit(0, 1, replace(run, work=tmp_path / "two", steps=2))
    three = fit(0, 1, replace(run, work=tmp_path / "three", steps=3))
    assert (two["online"]["stopped"], three["online"]["stopped"]) == (0, 0)
    assert same(two["state"], three["state"]), "an update that is left out changes no weight"
    assert whole["online"]["stopped"] == 1
    told = [line for line in lines(run.work) if "learning_rate" in line]
    assert [line.get("update/left_out") for line in told] == [None, None, 1.0] * 2
    assert ["loss" in line for line in told] == ["policy/approx_kl" in line for line in told] == [True, True, False] * 2
    cut = replace(run, work=tmp_path / "cut", save_every=2, parameter_hook=stop_at(3))
    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, cut)
    again = fit(0, 1, replace(cut, parameter_hook=None))
    assert again["resumed"] == 2
    assert same(whole["state"], again["state"])


# --- log-probabilities ------------------------------------------------------------------------------------------------


def counted(monkeypatch) -> list[str]:
    """The roles that are run over rollouts from now on."""
    roles, own = [], making.run_passes

    def run_passes(model, readings, *args):
        roles.extend(role for role, _ in readings)
        return own(model, readings, *args)

    monkeypatch.setattr(making, "run_passes", run_passes)
    return roles


@pytest.mark.parametrize("kind", ["grpo", "rloo", "reinforce_pp"])
def test_with_one_update_per_rollout_nobody_asks_the_policy_what_it_said(kind, base, tmp_path, monkeypatch):
    roles = counted(monkeypatch)
    settings = {"prompts_per_rollout": 5} | ({} if kind == "grpo" else {"beta": 0.0})
    run = Run(base, tmp_path / "without", kind, steps=3, settings=settings)
    without = fit(0, 1, run)
    assert roles == ["reference", "reward"] * 3
    assert without["online"]["logps"] is None
    roles.clear()
    monkeypatch.setattr(making.Online, "_wants_old", True)
    having = fit(0, 1, replace(run, work=tmp_path / "having"))
    assert roles == ["policy", "reference", "reward"] * 3
    assert without["losses"] == pytest.approx(having["losses"], abs=1e-5)
    assert without["grad_norms"] == pytest.approx(having["grad_norms"], rel=1e-4)
    assert all(without["state"][k] == pytest.approx(having["state"][k], abs=2e-4) for k in having["state"])


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("grpo", {}, ["policy", "reference", "reward"]),
        ("grpo", {"prompts_per_rollout": 5, "reference": None, "reward": None}, []),
        ("rloo", {"prompts_per_rollout": 5}, ["policy", "reference", "reward"]),
        ("rloo", {"prompts_per_rollout": 5, "epochs_per_rollout": 2, "beta": 0.0}, ["policy", "reference", "reward"]),
        ("ppo", {"prompts_per_rollout": 5, "beta": 0.0}, ["policy", "reference", "critic", "reward"]),
        ("ppo", {"reference": None, "reward": None}, ["policy", "critic"]),
    ],
)
def test_a_role_is_run_over_a_rollout_where_somebody_reads_it(kind, settings, expected, base, tmp_path, monkeypatch):
    roles = counted(monkeypatch)
    fit(0, 1, Run(base, tmp_path, kind, steps=1, settings=settings))
    assert roles == expected


def plain_logps(causal_lm, prompt, completion, temperature):
    logits = causal_lm(input_ids=torch.tensor([prompt + completion])).logits[0].float() / temperature
    at = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return logits.log_softmax(-1)[at, torch.tensor(completion)]


def test_every_log_probability_is_taken_at_the_temperature(base, tmp_path):
    generation = {"max_new_tokens": 6, "temperature": 0.7}
    run = Run(base, tmp_path, "ppo", steps=3, settings={"generation": generation, "missing_eos": "keep"})
    trainer = run.trainer()
    trainer.fit()
    trainer.online.prepare(trainer.model, 3, trainer.step)  # with the weights that there are now, and without an update
    rollout, step, model = trainer.online.buffer.rollout, trainer.step, trainer.model
    asked = [trainer.online.buffer.prompts[p] for p in rollout.prompt.tolist()]
    with torch.no_grad():
        for role, found in (("policy", rollout.logps), ("reference", rollout.reference)):
            expected = [
                model(role, plain_logps, prompt, ids, 0.7)
                for prompt, ids in zip(asked, trainer.online.buffer.completions, strict=True)
            ]
            torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=2e-5)
        assert (rollout.logps - rollout.reference).abs().max() > 0.01
        examples = trainer.online.examples(3, range(15))
        for pack in step.packs(examples):
            kl = step.terms(model, pack, examples).metrics["policy/approx_kl"]
            assert kl.value.item() < 1e-9, "the update's own are of the same temperature"


# --- critic and texts -------------------------------------------------------------------------------------------------


def test_the_critic_has_a_learning_rate_of_its_own(base, tmp_path):
    run = Run(base, tmp_path, "ppo", steps=1, settings={"critic_learning_rate": 3e-3}, scheduler="linear")
    trainer = run.trainer()
    trainer.fit()
    rates = {id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for role, rate in (("policy", 1e-2), ("critic", 3e-3)):
        assert {rates[id(p)] for p in trainer.model.tensors(role).values()} == {rate}
    assert len(rates) == sum(len(trainer.model.tensors(role)) for role in ("policy", "critic"))
    plain = fit(0, 1, replace(run, work=tmp_path / "plain", settings={}))
    state = {name: t.numpy() for name, t in trainer.final_state.items()}
    differs = {name.startswith("critic/") for name in state if not np.array_equal(state[name], plain["state"][name])}
    assert differs == {True}


def test_texts_are_mixed_in_with_their_weight(base, tmp_path):
    """The term is the mean negative log-likelihood of a step's texts, at temperature 1; an epoch has all of them."""
    generation = {"max_new_tokens": 6, "temperature": 0.5}
    settings = {"ptx": "x", "ptx_weight": 0.7, "generation": generation, "missing_eos": "keep"}
    trainer = Run(base, tmp_path, "ppo", steps=1, settings=settings, texts=10).trainer()
    online, step, model = trainer.online, trainer.step, trainer.model
    online.prepare(model, 0, step)
    seen = []
    for number in range(2):
        examples = online.examples(number, trainer.train_dataset[number])
        own = [e for e in examples if e in online.texts]
        assert (len(examples), len(own)) == (10, 5)
        seen += [e.row for e in own]
        packs = step.packs(examples)
        weights = step.weights(examples, packs)
        with torch.no_grad():
            terms = [step.terms(model, pack, examples).terms for pack in packs]
            logps = [
                model("policy", plain_logps, e.prompt_ids, c.ids, 1.0)
                for e in own for c in e.completions
            ]  # fmt: skip
        total = sum(t["ptx"].sum.sum().item() for t in terms if "ptx" in t)
        assert weights["ptx"] == sum(map(len, logps))
        assert total == pytest.approx(-torch.cat(logps).sum().item(), rel=1e-5)
        assert {t["ptx"].coefficient for t in terms if "ptx" in t} == {0.7}
        drawn = sum(len(c.ids) for e in examples if e not in own for c in e.completions)
        assert weights["policy"] == weights["value"] == drawn
    assert sorted(seen) == list(range(10))


def test_every_rank_has_its_share_of_the_texts(base, tmp_path, monkeypatch):
    online = Run(base, tmp_path, "ppo", steps=1, settings={"ptx": "x"}, texts=7).trainer().online
    whole = online.examples(0, ())
    monkeypatch.setattr(making.collectives, "world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(making.collectives, "rank", lambda rank=rank: rank)
        parts.append(online.examples(0, ()))
    assert ([len(part) for part in parts], len(whole)) == ([3, 2], 5)
    assert sorted(e.row for part in parts for e in part) == sorted(e.row for e in whole)


def test_one_pack_equals_many_with_texts(base, tmp_path):
    run = Run(base, tmp_path / "1", "ppo", steps=3, settings={"ptx": "x"}, texts=12, pack_tokens=100_000)
    one = fit(0, 1, run)
    many = fit(0, 1, replace(run, work=tmp_path / "8", pack_tokens=1))
    none = fit(0, 1, replace(run, work=tmp_path / "0", texts=0))
    assert one["losses"] == pytest.approx(many["losses"], abs=5e-6)
    assert one["grad_norms"] == pytest.approx(many["grad_norms"], rel=1e-4)
    told = [line["ptx/loss"] for line in lines(run.work) if "loss" in line]
    assert one["losses"][0] - none["losses"][0] == pytest.approx(told[0], abs=1e-5)
