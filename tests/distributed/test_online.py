"""Two ranks draw, score and learn what one process does, go on exactly, and stop together."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from align.spec.train import TrainSettings
from align.training import checkpoint as ckpt
from align.training import online as making
from tests.distributed.ranks import run_ranks
from tests.distributed.test_equivalence import distance, fit_until_left, leave_after
from tests.training.test_online_resume import EVERYTHING, measured
from tests.training.worlds import Checksum, Run, fit, losses, rollout_of, save_tiny_base

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Run:
    """Rollouts before steps 1 and 4; of each 8 and 7 prompts are drawn, of each step 3 and 2 are trained on.

    The texts that are mixed in are of one rank in every third step, and one of the updates is left out.
    """
    work = tmp_path_factory.mktemp("one")
    return Run(base, work, "ppo", steps=5, settings=EVERYTHING, texts=6, scheduler="cosine")


@pytest.fixture(scope="module")
def alone(run) -> dict:
    return run_ranks(fit, run, world=1)[0]


@pytest.mark.parametrize("deepspeed", ["none", "zero2", "zero3"])
def test_two_ranks_make_the_rollouts_of_one_process(deepspeed, run, alone, tmp_path):
    """Token by token, in fp32; and all that is found out about them, told of them and learnt from them."""
    two = replace(run, work=tmp_path, deepspeed=deepspeed, same_rollouts=run.work)
    left_out = [line["step"] for line in measured(run.work) if "update/left_out" in line]
    assert left_out == [3]
    for found in run_ranks(fit, two, deepspeed=deepspeed != "none"):
        ours, theirs = found["online"], alone["online"]
        for name in ("scores", "logps", "reference", "values", "advantages", "returns"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-4), name
        assert ours["progress"].beta == pytest.approx(theirs["progress"].beta, rel=1e-5)
        assert ours["progress"].square == pytest.approx(theirs["progress"].square, rel=1e-5)
        assert ours["stopped"] == theirs["stopped"]
        assert found["losses"] == pytest.approx(alone["losses"], abs=2e-5)
        assert distance(alone["state"], found["state"]) < 2e-4
    assert rollout_of(tmp_path, 0).completions == rollout_of(run.work, 0).completions
    for ours, theirs in zip(measured(tmp_path), measured(run.work), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"grad_norm"}:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-3), name


def fit_and_count(rank, world, run):
    """What `fit` gives, and how often completions were drawn."""
    calls, own = [], making.sample

    def sample(*args, **kwargs):
        calls.append(own(*args, **kwargs))
        return calls[-1]

    making.sample = sample  # in this process, which was forked for this run
    return fit(rank, world, run), len(calls)


@pytest.mark.parametrize("deepspeed", ["none", "zero3"])
def test_two_ranks_go_on_exactly_and_draw_nothing_again(deepspeed, run, tmp_path):
    """Left after the update that follows the second rollout, with a checkpoint from before it."""
    zero = deepspeed != "none"
    whole = replace(run, work=tmp_path / "whole", deepspeed=deepspeed, save_every=3)
    expected = run_ranks(fit, whole, deepspeed=zero)[0]
    cut = replace(whole, work=tmp_path / "cut")
    run_ranks(fit_until_left, replace(cut, parameter_hook=leave_after(4)), deepspeed=zero)
    for found, drawn in run_ranks(fit_and_count, cut, deepspeed=zero):
        assert (found["resumed"], drawn) == (3, 0)
        assert found["online"]["progress"] == expected["online"]["progress"]
        assert all(np.array_equal(found["state"][name], expected["state"][name]) for name in expected["state"])
    assert measured(cut.work) == measured(whole.work)


@pytest.mark.parametrize("deepspeed", ["none", "zero3"])
def test_a_rank_without_a_prompt_keeps_in_step(deepspeed, run, tmp_path):
    """One prompt per rollout and per step: the second rank has nothing to draw, to score and to learn from."""
    train = TrainSettings(global_batch_size=1, lr_scheduler="constant", warmup_ratio=0)
    one = replace(run, work=tmp_path / "one", steps=2, settings={"prompts_per_rollout": 1, "train": train}, texts=0)
    expected = run_ranks(fit, one, world=1)[0]
    two = replace(one, work=tmp_path / "two", deepspeed=deepspeed, same_rollouts=one.work)
    for found in run_ranks(fit, two, deepspeed=deepspeed != "none"):
        assert rollout_of(two.work, 0).completions == rollout_of(one.work, 0).completions
        assert found["losses"] == pytest.approx(expected["losses"], abs=2e-5)
        assert distance(expected["state"], found["state"]) < 2e-4


# --- bad numbers and failures on one rank -----------------------------------------------------------------------------


def nan_reward(trainer):
    trainer.model.head("reward").register_forward_hook(
        lambda module, args, out: out * float("nan") if trainer.state.global_step else out
    )


def scorer(score):
    def hook(trainer):
        own = Checksum().score
        bad = lambda *texts: score() if trainer.state.global_step else own(*texts)  # noqa: E731
        trainer.online.judges.scorers["x"] = ("x", SimpleNamespace(score=bad))

    return hook


def nan_gradient(trainer):
    parameter = next(p for p in trainer.model.tensors("critic").values() if p.requires_grad)
    parameter.register_hook(lambda g: g * float("nan") if trainer.state.global_step >= 3 else g)
    guard = trainer._gradients
    guard.close()
    trainer._gradients = type(guard)(p for p in trainer.model.parameters() if p.requires_grad)


BAD = {
    "reward": (nan_reward, ["the score of `reward` is not finite in rollout 2; the weights are those of step 3"] * 2),
    "score": (scorer(lambda: float("nan")), ["scorer `x` returned nan"] * 2),
    "scorer": (scorer(lambda: 1 / 0), ["rank 1 failed: ZeroDivisionError: division by zero", "division by zero"]),
    "gradient": (nan_gradient, ["the gradient of step 4 is not finite; the weights are those of step 3"] * 2),
}


def fit_with(rank, world, run, hook):
    """What rank 1 alone is done to, and how each rank then ends."""
    trainer = run.trainer()
    if rank == 1:
        hook(trainer)
    try:
        trainer.fit()
    except Exception as error:
        state = ckpt.gather_trainable(trainer.model)
        return str(error), trainer.state.global_step, losses(trainer), {k: v.numpy() for k, v in state.items()}
    return "no error", trainer.state.global_step, losses(trainer), {}


@pytest.mark.parametrize(("what", "deepspeed"), [*((what, "none") for what in BAD), ("reward", "zero3")])
def test_what_goes_wrong_on_one_rank_stops_both_before_the_weights_change(what, deepspeed, base, tmp_path):
    hook, told = BAD[what]
    run = Run(base, tmp_path, "ppo", deepspeed=deepspeed, save_every=3, settings={"scorers": ["x"]})
    found = run_ranks(fit_with, run, hook, deepspeed=deepspeed != "none", timeout=60)
    kept = ckpt.read_trainable(tmp_path / "checkpoints" / "step-000003")
    for (message, step, _, state), expected in zip(found, told, strict=True):
        assert expected in message
        assert step == 3
        assert all(np.array_equal(state[name], kept[name].numpy()) for name in kept)
    assert [p.name for p in sorted((tmp_path / "rollouts").iterdir())] == [
        f"rollout-{number:06d}" for number in range(2 if what == "gradient" else 1)
    ]
