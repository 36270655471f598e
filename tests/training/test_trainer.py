"""The trainer on one process: packing, guards, checkpoints, resume, validation."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from align.errors import TrainingError
from align.training import checkpoint as ckpt
from tests.training.worlds import Run, fit, save_tiny_base

KINDS = ["sft", "dpo"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_one_pack_equals_many(kind, quantization, checkpointing, base, tmp_path):
    one = fit(0, 1, Run(base, tmp_path / "1", kind, quantization, steps=2, pack_tokens=100_000))
    many = fit(0, 1, Run(base, tmp_path / "8", kind, quantization, steps=2, pack_tokens=1, checkpointing=checkpointing))
    assert one["losses"] == pytest.approx(many["losses"], abs=1e-6)
    assert one["grad_norms"] == pytest.approx(many["grad_norms"], rel=1e-5)


def test_dpo_starts_at_ln_2(base, tmp_path):
    assert fit(0, 1, Run(base, tmp_path, "dpo", "nf4", steps=1))["losses"][0] == pytest.approx(np.log(2), abs=1e-6)


def test_training_learns(base, tmp_path):
    losses = fit(0, 1, Run(base, tmp_path, steps=24))["losses"]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [True, False])
def test_resume_is_exact(kind, adapter, base, tmp_path):
    """Stop after step 4 of 6 with checkpoints at 2 and 4; the second run ends where an undisturbed one ends."""
    run = Run(base, tmp_path / "whole", kind, steps=6, save_every=2, adapter=adapter, validation=5)
    whole = fit(0, 1, run)
    cut = replace(run, work=tmp_path / "cut", parameter_hook=stop_at(5))
    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, cut)
    again = fit(0, 1, replace(cut, parameter_hook=None))
    assert again["resumed"] == 4
    assert same(whole["state"], again["state"])
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_passed_over(base, tmp_path, caplog):
    run = Run(base, tmp_path / "whole", steps=6, save_every=2)
    whole = fit(0, 1, run)
    cut = replace(run, work=tmp_path / "cut", parameter_hook=stop_at(5))
    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, cut)
    weights = cut.work / "checkpoints" / "step-000004" / ckpt.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    again = fit(0, 1, replace(cut, parameter_hook=None))
    assert again["resumed"] == 2
    assert "step-000004 is damaged" in caplog.text
    assert same(whole["state"], again["state"])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_number_never_reaches_the_weights(where, base, tmp_path):
    run = Run(base, tmp_path, quantization="nf4", parameter_hook=poison(where, step=2))
    trainer = run.trainer()
    run.parameter_hook(trainer, 0)
    with pytest.raises(TrainingError, match=rf"the {where} of step 3 is not finite.*\[\d+(, \d+)*\]"):
        trainer.fit()
    state = ckpt.gather_trainable(trainer.model)
    two = fit(0, 1, Run(base, tmp_path / "two", quantization="nf4", steps=2))
    assert all(torch.isfinite(t).all() for t in state.values())
    assert same({k: v.numpy() for k, v in state.items()}, two["state"])


def test_checkpoints_hold_no_pickled_arguments(base, tmp_path):
    fit(0, 1, Run(base, tmp_path, steps=2, save_every=2))
    names = {p.name for p in (tmp_path / "checkpoints" / "step-000002").iterdir()}
    assert ckpt.WEIGHTS in names
    assert "training_args.bin" not in names


def test_a_best_validation_after_the_last_checkpoint_is_made_again(base, tmp_path):
    run = Run(base, tmp_path / "whole", steps=8, save_every=3, validation=8, learning_rate=1e-2)

    def keep_best(trainer):
        trainer.validation_settings.keep = "best"
        trainer.validation = trainer.examples[:8]  # what is trained on, so that every validation is the best so far

    def left_after(step):
        def hook(trainer, rank):
            keep_best(trainer)
            stop_at(step)(trainer, rank)

        return hook

    whole = fit(0, 1, replace(run, parameter_hook=lambda trainer, rank: keep_best(trainer)))
    cut = replace(run, work=tmp_path / "cut", parameter_hook=left_after(6))
    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, cut)
    assert (cut.work / "best" / "step-000004").is_dir()
    again = fit(0, 1, replace(cut, parameter_hook=lambda trainer, rank: keep_best(trainer)))
    assert again["resumed"] == 3
    assert same(whole["state"], again["state"])


def test_a_damaged_reference_cache_is_computed_again(base, tmp_path, caplog):
    run = Run(base, tmp_path / "whole", "dpo", steps=6, save_every=2, adapter=False)
    whole = fit(0, 1, run)
    cut = replace(run, work=tmp_path / "cut", parameter_hook=stop_at(5))
    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, cut)
    (shard,) = (cut.work / "reference").glob("rows-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    again = fit(0, 1, replace(cut, parameter_hook=None))
    assert f"{shard.name} is damaged" in caplog.text
    assert again["resumed"] == 4
    assert same(whole["state"], again["state"])


def test_the_first_step_of_a_short_run_trains(base, tmp_path):
    run = Run(base, tmp_path, steps=1)
    state = fit(0, 1, run)["state"]
    assert any(np.abs(tensor).sum() > 0 for name, tensor in state.items() if "lora_B" in name)


def test_best_weights_and_patience(base, tmp_path):
    """A learning rate that ruins the model: the best validation is an early one, and patience ends the run."""
    run = Run(base, tmp_path, steps=30, validation=8, learning_rate=0.5)
    trainer = run.trainer()
    trainer.validation_settings.keep, trainer.validation_settings.patience = "best", 2
    trainer.fit()
    evals = [(line["step"], line["eval_loss"]) for line in trainer.state.log_history if "eval_loss" in line]
    best = min(evals, key=lambda e: e[1])[0]
    assert trainer.state.best_global_step == best
    assert evals[-1][0] == best + 2 * 2
    kept = ckpt.read_trainable(tmp_path / "best" / f"step-{best:06d}")
    assert all(torch.equal(kept[k], trainer.final_state[k]) for k in kept)


def stop_at(step: int):
    """Leave the run in the middle of a step, as an outside event would."""

    def hook(trainer, rank):
        original = trainer.training_step

        def training_step(*args, **kwargs):
            if trainer.state.global_step == step - 1:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        trainer.training_step = training_step

    return hook


def poison(where: str, step: int):
    """Make one loss or one gradient not a number at that step, inside the real computation."""

    def hook(trainer, rank):
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        nan = lambda t: t * float("nan") if trainer.state.global_step >= step else t  # noqa: E731
        if where == "gradient":
            trainer._gradients.close()
            parameter.register_hook(nan)
            trainer._gradients = type(trainer._gradients)(p for p in trainer.model.parameters() if p.requires_grad)
        else:
            trainer.model.causal_lm.lm_head.register_forward_hook(lambda module, args, out: nan(out))

    return hook
