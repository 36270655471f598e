"""The trainer on one process: packing, guards, checkpoints, resume, validation."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from align.errors import RecipeError, TrainingError
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


def test_the_best_before_a_checkpoint_outlives_better_ones_that_a_resumed_run_does_not_reach_again(base, tmp_path):
    run = Run(base, tmp_path, steps=8, save_every=3, validation=8, learning_rate=1e-2)

    def keep_best(trainer):
        trainer.validation_settings.keep = "best"
        trainer.validation = trainer.examples[:8]  # what is trained on, so that every validation is the best so far

    def left(trainer, rank):
        keep_best(trainer)
        stop_at(6)(trainer, rank)

    def worse(trainer, rank):
        keep_best(trainer)
        own = trainer._determine_best_metric
        trainer._determine_best_metric = lambda metrics, trial: own({k: v + 9 for k, v in metrics.items()}, trial)

    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, replace(run, parameter_hook=left))
    assert bests(tmp_path) == [2, 4]
    then = ckpt.read_trainable(tmp_path / "best" / "step-000002")
    again = fit(0, 1, replace(run, parameter_hook=worse))
    assert again["resumed"] == 3
    assert same({k: v.numpy() for k, v in then.items()}, again["state"])


def test_bests_that_no_checkpoint_names_are_dropped(base, tmp_path):
    run = Run(base, tmp_path, steps=12, save_every=5, validation=8, learning_rate=1e-2)
    seen = {}

    def keep_best(trainer, rank):
        trainer.validation_settings.keep = "best"
        trainer.validation = trainer.examples[:8]
        trainer.keep_checkpoints = 1
        own = trainer._maybe_log_save_evaluate

        def at_the_end_of_a_step(*args, **kwargs):
            own(*args, **kwargs)
            seen[trainer.state.global_step] = bests(tmp_path)

        trainer._maybe_log_save_evaluate = at_the_end_of_a_step

    fit(0, 1, replace(run, parameter_hook=keep_best))
    assert list(seen.values()) == [[], [2], [2], [4], [4], [4, 6], [4, 6], [4, 8], [4, 8], [10], [10], [12]]
    ckpt.forget_after(tmp_path / "checkpoints", 0)
    ckpt.drop_bests(tmp_path / "best", tmp_path / "checkpoints", None)
    assert bests(tmp_path) == []


def test_a_checkpoint_whose_state_cannot_be_read_names_no_best(tmp_path):
    contents = {1: '{"best_global_step": 3}', 2: "{", 3: "{}", 4: "[]", 5: '{"best_global_step": null}', 6: None}
    for step, content in contents.items():
        (tmp_path / "best" / f"step-{step:06d}").mkdir(parents=True)
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    ckpt.drop_bests(tmp_path / "best", tmp_path / "checkpoints", 6)
    assert bests(tmp_path) == [3, 6]


def bests(work) -> list[int]:
    return [ckpt.step_of(best) for best in ckpt.checkpoints(work / "best")]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "longrope", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128,
         "short_factor": [1.0] * 16, "long_factor": [4.0] * 16},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_sequences_that_would_depend_on_their_neighbours_are_refused_before_training(rope, base, tmp_path):
    trainer = Run(base, tmp_path, "dpo", steps=1).trainer()
    trainer.model.config.rope_parameters = rope
    trainer.step.config.train.max_tokens = 129
    told = "max_tokens 129 is more than the 128 positions that the model was first made for"
    with pytest.raises(RecipeError, match=told) as caught:
        trainer.fit()
    assert caught.value.fix == "lower max_tokens to 128"
    assert not (tmp_path / "reference").exists() or not any((tmp_path / "reference").iterdir())
    trainer.step.config.train.max_tokens = 128
    trainer.fit()


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
            trainer.model.causal_lm.lm_head.register_forward_hook(
                lambda module, args, out: (nan(out[0]), *out[1:]) if isinstance(out, tuple) else nan(out)
            )

    return hook
