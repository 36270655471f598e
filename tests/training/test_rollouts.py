"""What a rollout is made of: scores and what becomes of them, the KL coefficient, and what may not be in it."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from align.errors import TrainingError
from align.methods import get_method
from align.training import checkpoint as ckpt
from align.training.buffer import Buffer
from align.training.online import _merged, _Part, steered
from align.training.schedule import StepDataset
from tests.methods.batches import config_of
from tests.training.test_online import lines
from tests.training.test_trainer import poison, same
from tests.training.worlds import Checksum, Run, fit, save_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def rollouts(work) -> list[Buffer]:
    return [Buffer.read(folder) for folder in sorted((work / "rollouts").iterdir())]


def texts(buffer: Buffer, tokenizer) -> list[tuple[str, str]]:
    """Prompt and completion of every completion, as a scorer sees them."""
    asked = [tokenizer.decode(buffer.prompts[p]) for p in buffer.rollout.prompt.tolist()]
    said = tokenizer.batch_decode(buffer.completions, skip_special_tokens=True)
    return list(zip(asked, said, strict=True))


# --- scores -----------------------------------------------------------------------------------------------------------


def test_the_parts_of_ranks_are_merged_in_the_order_of_the_prompts():
    def part(places):
        return _Part(
            places,
            [[[100 + p], [200 + p]] for p in places],
            [[True, False] for _ in places],
            {"x": [[float(p), float(-p)] for p in places]},
            {"logps": [torch.full((2,), float(p)) for p in places]},
        )

    found = _merged([part([0, 3, 6]), part([1, 4]), part([2, 5]), part([])], 7)
    assert found.completions == [[[100 + p], [200 + p]] for p in range(7)]
    assert found.scores["x"] == [[p, -p] for p in range(7)]
    assert torch.cat(found.tensors["logps"]).tolist() == [float(p) for p in range(7) for _ in range(2)]


@pytest.mark.parametrize("missing_eos", ["replace", "subtract", "drop", "keep"])
def test_what_becomes_of_a_completion_without_an_end(missing_eos, base, tmp_path):
    settings = {"reward": None, "missing_eos": missing_eos, "missing_eos_score": -0.25, "score_clip": 0.4}
    if missing_eos in ("drop", "keep"):
        del settings["missing_eos_score"]
    run = Run(base, tmp_path, "grpo", steps=1, settings=settings)
    trainer = run.trainer()
    trainer.fit()
    buffer = trainer.online.buffer
    raw = np.array([Checksum().score(*each) for each in texts(buffer, trainer.online.tokenizer)])
    ended = np.array(buffer.ended)
    assert 0 < ended.sum() < len(ended)
    scores = np.clip(raw, -0.4, 0.4)
    expected = {
        "replace": np.where(ended, scores, -0.25),
        "subtract": np.where(ended, scores, scores - 0.25),
    }.get(missing_eos, scores)
    assert buffer.rollout.scores.numpy() == pytest.approx(expected, abs=1e-6)
    assert buffer.rollout.kept.tolist() == (buffer.ended if missing_eos == "drop" else [True] * len(ended))
    kept = [k for e in buffer.examples() for k in e.drawn.kept]
    assert kept == buffer.rollout.kept.tolist()
    assert buffer.metrics["rollout/score"] == pytest.approx(raw.mean(), abs=1e-6)
    assert buffer.metrics["rollout/reward"] == pytest.approx(expected.mean(), abs=1e-6)


def test_scores_are_normalised_by_what_all_rollouts_scored(base, tmp_path):
    settings = {"reward": None, "normalise_scores": True, "missing_eos": "keep"}
    trainer = Run(base, tmp_path, "rloo", steps=9, settings=settings).trainer()
    trainer.fit()
    found, seen = rollouts(tmp_path), []
    assert len(found) == 3
    for buffer in found:
        raw = np.array([Checksum().score(*each) for each in texts(buffer, trainer.online.tokenizer)])
        seen = np.concatenate([seen, raw])
        expected = (raw - seen.mean()) / (seen.std() + 1e-8)
        assert buffer.rollout.scores.numpy() == pytest.approx(expected, abs=1e-5)
        assert (buffer.progress.count, buffer.progress.mean) == (len(seen), pytest.approx(seen.mean(), abs=1e-6))
        assert buffer.progress.std == pytest.approx(seen.std(), abs=1e-6)


def test_a_score_of_weight_0_only_watches(base, tmp_path):
    run = Run(base, tmp_path / "watched", "grpo", steps=4, settings={"scorers": ["x", "y"], "weights": {"y": 0.0}})
    alone = replace(run, work=tmp_path / "alone", settings={"scorers": ["x"]})
    assert same(fit(0, 1, run)["state"], fit(0, 1, alone)["state"])
    watched = [line["score/y"] for line in lines(run.work) if "score/y" in line]
    assert len(watched) == 2
    assert all(0 < each < 1 for each in watched)


# --- the KL -----------------------------------------------------------------------------------------------------------


def test_the_kl_coefficient_follows_its_target():
    """Target 6, horizon 10000, 256 completions; the numbers are those of the vector `adaptive_kl_controller`."""
    stage = config_of(get_method("ppo"), beta=0.2, kl_target=6.0, kl_horizon=10_000)
    beta, found = 0.2, []
    for kl in (9.0, 3.0, 6.3, 6.0):
        beta = steered(beta, kl, 256, stage)
        found.append(beta)
    assert found == pytest.approx([0.201024, 0.199995, 0.200251, 0.200251], abs=5e-7)
    assert steered(0.2, 9.0, 256, config_of(get_method("ppo"), beta=0.2)) == 0.2


def test_a_rollout_is_rewarded_with_the_coefficient_of_the_one_before(base, tmp_path):
    settings = {"beta": 0.3, "kl_target": 0.05, "kl_horizon": 100}
    trainer = Run(base, tmp_path, "reinforce_pp", steps=9, settings=settings).trainer()
    trainer.fit()
    found, beta = rollouts(tmp_path), 0.3
    for buffer in found:
        assert buffer.rollout.beta == buffer.metrics["rollout/beta"] == beta
        beta = steered(beta, buffer.metrics["rollout/kl"], len(buffer.completions), trainer.online.stage)
        assert buffer.progress.beta == beta
    assert len({buffer.rollout.beta for buffer in found}) == 3


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "settings"), [("ppo", {}), ("grpo", {"prompts_per_rollout": 5, "reference": None})])
def test_a_rollout_is_read_as_it_was_written(kind, settings, base, tmp_path):
    trainer = Run(base, tmp_path / "run", kind, steps=1, settings=settings).trainer()
    trainer.fit()
    buffer = trainer.online.buffer
    (tmp_path / "folder").mkdir()
    buffer.write(tmp_path / "folder")
    found = Buffer.read(tmp_path / "folder")
    for whole, own in ((buffer, found), (buffer.rollout, found.rollout), (buffer.made, found.made)):
        for name in (f.name for f in fields(whole) if f.name not in ("rollout", "made")):
            one, other = getattr(whole, name), getattr(own, name)
            assert torch.equal(one, other) and one.dtype == other.dtype if torch.is_tensor(one) else one == other, name
    assert (found.rollout.values is None) == (found.made.returns is None) == (kind != "ppo")
    assert (found.rollout.logps is None) == (found.rollout.reference is None) == (kind == "grpo")


def test_an_example_has_what_was_found_out_about_its_own_tokens(base, tmp_path):
    trainer = Run(base, tmp_path, "ppo", steps=1).trainer()
    trainer.fit()
    buffer, examples = trainer.online.buffer, trainer.online.buffer.examples()
    assert [e.prompt_ids for e in examples] == buffer.prompts
    assert (
        [e.row for e in examples]
        == buffer.rows
        == [trainer.online.prompts[i].row for i in trainer.online.schedule.asked(0)]
    )
    assert [c.ids for e in examples for c in e.completions] == buffer.completions
    whole = {"old": buffer.rollout.logps, "advantages": buffer.made.advantages, "returns": buffer.made.returns}
    whole |= {"reference": buffer.rollout.reference, "values": buffer.rollout.values}
    for name, expected in whole.items():
        assert torch.equal(torch.cat([getattr(e.drawn, name) for e in examples]), expected)
        for e in examples:
            assert len(getattr(e.drawn, name)) == sum(len(c.ids) for c in e.completions)


def test_a_step_learns_from_the_prompts_at_its_places(base, tmp_path):
    """Of the second rollout, and each from the share of its rank."""
    trainer = Run(base, tmp_path, "grpo", steps=4).trainer()
    trainer.fit()
    online = trainer.online
    asked = online.schedule.asked(1)
    for step in (3, 4, 5):
        places = StepDataset(online.schedule, 1, 2)[step]
        examples = online.examples(step, places)
        assert [e.row for e in examples] == [online.prompts[asked[place]].row for place in places]
        assert [e.prompt_ids for e in examples] == [online.prompts[asked[place]].prompt_ids for place in places]


# --- bad numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_non_finite_number_never_reaches_the_weights(kind, where, base, tmp_path):
    run = Run(base, tmp_path / "bad", kind, parameter_hook=poison(where, step=2))
    trainer = run.trainer()
    run.parameter_hook(trainer, 0)
    with pytest.raises(TrainingError, match=rf"the {where} of step 3 is not finite.*\[\d+(, \d+)*\]"):
        trainer.fit()
    state = {k: v.numpy() for k, v in ckpt.gather_trainable(trainer.model).items()}
    assert same(state, fit(0, 1, Run(base, tmp_path / "two", kind, steps=2))["state"])


def bad_reward(trainer, rank):
    head = trainer.model.head("reward")
    head.register_forward_hook(lambda module, args, out: out * float("nan") if trainer.state.global_step else out)


def bad_score(value, trainer, rank):
    own = Checksum().score
    score = lambda *texts: value if trainer.state.global_step else own(*texts)  # noqa: E731
    trainer.online.judges.scorers["x"] = ("x", SimpleNamespace(score=score))


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> tuple[Run, dict]:
    run = Run(base, tmp_path_factory.mktemp("whole"), "rloo", steps=4, save_every=3)
    return run, fit(0, 1, run)


@pytest.mark.parametrize(
    ("hook", "told"),
    [
        (bad_reward, r"the score of `reward` is not finite in rollout 2; the weights are those of step 3.*\[\d+"),
        (partial(bad_score, float("nan")), "scorer `x` returned nan for the prompt in row"),
        (partial(bad_score, "good"), "scorer `x` returned 'good' for the prompt in row"),
        (poison("loss", step=3), r"the pass `logps` is not finite in rollout 2"),
    ],
)
def test_a_rollout_with_a_bad_number_is_neither_trained_on_nor_kept(hook, told, undisturbed, tmp_path):
    run, whole = undisturbed
    run = replace(run, work=tmp_path, parameter_hook=hook)
    trainer = run.trainer()
    run.parameter_hook(trainer, 0)
    with pytest.raises(TrainingError, match=told):
        trainer.fit()
    assert trainer.state.global_step == 3
    again = fit(0, 1, replace(run, parameter_hook=None))
    assert again["resumed"] == 3
    assert same(whole["state"], again["state"]), "what was wrong is mended, and the run goes on as if it had never been"
