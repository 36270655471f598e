"""Two ranks compute what one process computes, under every launcher the recipe knows.

Tolerance: losses to 2e-5 absolute, trained tensors to 2e-4 relative L2; fp32 sums differ in order, nothing else does.
The last global batches differ in length per rank, so packs are uneven and empty ones are run.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from align.methods import all_methods
from tests.distributed.ranks import RankError, run_ranks
from tests.training.worlds import Run, fit, rollout_of, save_tiny_base

pytest.importorskip("deepspeed")

LAUNCHERS = ["none", "zero1", "zero2", "zero3"]
MODELS = {"nf4-lora": ("nf4", True), "full": ("none", False), "lora": ("none", True)}
OTHERS = sorted(all_methods().keys() - {"pretrain", "sft", "dpo", "reward"})
CASES = [
    *((kind, model, launcher) for kind in ("sft", "dpo") for model in ("nf4-lora", "full") for launcher in LAUNCHERS),
    ("dpo", "lora", "zero3"),
    *(("reward", "nf4-lora", launcher) for launcher in LAUNCHERS),
    *(("reward", "full", launcher) for launcher in ("none", "zero2", "zero3")),
    *((kind, "nf4-lora", launcher) for kind in OTHERS for launcher in ("zero2", "zero3")),
    *((kind, "nf4-lora", "none") for kind in ("ppo", "grpo")),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


_alone: dict[tuple[str, str], dict] = {}


def alone(kind: str, model: str, base, tmp_path_factory) -> dict:
    if (kind, model) not in _alone:
        quantization, adapter = MODELS[model]
        work = tmp_path_factory.mktemp("alone")
        run = Run(base, work, kind=kind, quantization=quantization, adapter=adapter, validation=7)
        _alone[kind, model] = run_ranks(fit, run, world=1)[0]
    return _alone[kind, model]


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    flat = [np.concatenate([s[k].ravel() for k in sorted(s)]) for s in (a, b)]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0]))


@pytest.mark.parametrize(("kind", "model", "deepspeed"), CASES)
def test_two_ranks_equal_one(kind, model, deepspeed, base, tmp_path, tmp_path_factory):
    expected = alone(kind, model, base, tmp_path_factory)
    quantization, adapter = MODELS[model]
    run = Run(base, tmp_path, kind=kind, quantization=quantization, adapter=adapter, deepspeed=deepspeed, validation=7)
    run = replace(run, same_rollouts=expected["work"])
    for result in run_ranks(fit, run, deepspeed=deepspeed != "none"):
        assert result["wrapper"] == ("DistributedDataParallel" if deepspeed == "none" else "DeepSpeedEngine")
        assert result["sharded"] == (deepspeed == "zero3")
        assert len(result["losses"]) == 4
        assert result["losses"] == pytest.approx(expected["losses"], abs=2e-5)
        assert result["eval_losses"] == pytest.approx(expected["eval_losses"], abs=2e-5)
        assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-3)
        assert all(tensor.size for tensor in result["state"].values())
        assert distance(expected["state"], result["state"]) < 2e-4
    if expected["online"]:
        alike = [rollout_of(work, 0).completions for work in (expected["work"], tmp_path)]
        assert alike[0] == alike[1], "token by token"


@pytest.mark.parametrize("deepspeed", ["none", "zero3"])
def test_ranks_with_unequal_numbers_of_tiles(deepspeed, base, tmp_path):
    """With a real vocabulary a rank cuts its head into many tiles, and ranks differ in how many."""
    one = run_ranks(fit, Run(base, tmp_path / "one", kind="dpo"), world=1)[0]
    many = Run(base, tmp_path / "many", kind="dpo", deepspeed=deepspeed, tile_elements=7 * 300)
    for result in run_ranks(fit, many, deepspeed=deepspeed != "none"):
        assert result["losses"] == pytest.approx(one["losses"], abs=2e-5)
        assert distance(one["state"], result["state"]) < 2e-4


def leave_after(steps: int):
    def hook(trainer, rank):
        original = trainer.training_step

        def training_step(*args, **kwargs):
            if trainer.state.global_step == steps:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        trainer.training_step = training_step

    return hook


def fit_until_left(rank, world, run):
    with pytest.raises(KeyboardInterrupt):
        fit(rank, world, run)


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_resume_under_zero_is_exact(deepspeed, base, tmp_path):
    """Optimizer, learning rate schedule and weights go on where they were."""
    whole = Run(base, tmp_path / "whole", deepspeed=deepspeed, steps=6, save_every=2, scheduler="linear")
    expected = run_ranks(fit, whole, deepspeed=True)[0]
    cut = replace(whole, work=tmp_path / "cut")
    run_ranks(fit_until_left, replace(cut, parameter_hook=leave_after(5)), deepspeed=True)
    result = run_ranks(fit, cut, deepspeed=True)[0]
    assert result["resumed"] == 4
    assert result["losses"][-2:] == pytest.approx(expected["losses"][-2:], abs=1e-6)
    assert distance(expected["state"], result["state"]) < 1e-6


def test_a_checkpoint_of_another_launch_is_refused(base, tmp_path):
    run = Run(base, tmp_path, deepspeed="zero2", steps=6, save_every=2)
    run_ranks(fit_until_left, replace(run, parameter_hook=leave_after(5)), deepspeed=True)
    with pytest.raises(RankError, match="made by 2 processes with ZeRO-2 and cannot be continued"):
        run_ranks(fit, replace(run, deepspeed="none"))


def poison(trainer, rank):
    """From the third step on, one gradient of rank 1 is not a number."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.before = before
    if rank != 1:
        return
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda g: g * float("nan") if trainer.state.global_step >= 2 else g)
    guard = trainer._gradients
    guard.close()
    trainer._gradients = type(guard)(p for p in trainer.model.parameters() if p.requires_grad)


def fit_poisoned(rank, world, run):
    trainer = run.trainer()
    poison(trainer, rank)
    try:
        trainer.fit()
    except Exception as error:
        from align.training.checkpoint import gather_trainable

        state = gather_trainable(trainer.model)
        return str(error), trainer.state.global_step, {k: v.numpy() for k, v in state.items()}
    return "no error", trainer.state.global_step, {}


@pytest.mark.parametrize("deepspeed", ["none", "zero2", "zero3"])
def test_a_bad_gradient_on_one_rank_stops_both_before_the_weights_change(deepspeed, base, tmp_path):
    clean = Run(base, tmp_path / "clean", quantization="nf4", deepspeed=deepspeed, steps=2)
    expected = run_ranks(fit, clean, deepspeed=deepspeed != "none")[0]
    run = Run(base, tmp_path / "poisoned", quantization="nf4", deepspeed=deepspeed)
    for message, step, state in run_ranks(fit_poisoned, run, deepspeed=deepspeed != "none"):
        assert "gradient of step 3 is not finite" in message
        assert step == 2
        assert all(np.isfinite(t).all() for t in state.values())
        assert distance(expected["state"], state) < 1e-6


def test_a_rank_that_raises_is_reported():
    with pytest.raises(RankError, match="on rank 1"):
        run_ranks(_raise_on_one, timeout=30)


def _raise_on_one(rank, world):
    if rank == 1:
        raise ValueError("on rank 1")
    return rank
