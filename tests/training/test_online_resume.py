"""A run on rollouts that was stopped, anywhere, ends where an undisturbed one ends, and draws nothing twice."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.training import checkpoint as ckpt
from align.training import kept
from align.training import online as making
from align.training.kept import KeptRollouts, digest_of
from align.training.trainer import Preempted
from tests.training.test_online import lines
from tests.training.test_trainer import same
from tests.training.worlds import Run, fit, save_tiny_base

EVERYTHING = {
    "scorers": ["x"],
    "normalise_scores": True,
    "kl_target": 0.05,
    "kl_horizon": 100,
    "critic_learning_rate": 3e-3,
    "ptx": "x",
    "stop_kl": 0.005,
}
TIMES = {"rollout/seconds", "rollout/tokens_per_second", "tokens_per_second"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Run:
    """Rollouts before steps 1, 4 and 7; checkpoints after 2, 4, 6 and 8."""
    work = tmp_path_factory.mktemp("whole")
    return Run(
        base, work, "ppo", steps=9, save_every=2, scheduler="cosine", settings=EVERYTHING, texts=7
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(run) -> dict[str, Any]:
    """The undisturbed run. Some of its updates are left out, and not all."""
    found = fit(0, 1, run)
    assert 0 < sum("update/left_out" in line for line in lines(run.work)) < 4
    return found


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """How many prompts were answered by every call of `sample` that came to its end."""
    calls, own = [], making.sample

    def sample(model, role, prompts, *args, **kwargs):
        found = own(model, role, prompts, *args, **kwargs)
        calls.append(len(prompts))
        return found

    monkeypatch.setattr(making, "sample", sample)
    return calls


def measured(work: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines(work)]


def assert_alike(run: Run, whole: dict, cut: Run, again: dict) -> None:
    """Bit for bit: weights of policy and critic, KL coefficient, running statistics, and all that was told."""
    assert any(name.startswith("critic/") for name in whole["state"])
    assert same(whole["state"], again["state"])
    assert whole["online"]["progress"] == again["online"]["progress"]
    assert whole["online"]["progress"].count == 3 * 45
    assert measured(run.work) == measured(cut.work)
    assert (run.work / "samples.jsonl").read_text() == (cut.work / "samples.jsonl").read_text()


def leave(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def at(step: int, owner: Callable[[Any], Any], name: str, *, after: bool = False) -> Callable[[Any, int], None]:
    """Leave the run when something is called for the first time once `step` steps are done, before or after the call.

    Args:
        step: Steps that are done.
        owner: What has the function, of a trainer.
        name: Of the function.
        after: Whether the call is made first.
    """

    def hook(trainer, rank):
        own = getattr(owner(trainer), name)

        def function(*args, **kwargs):
            if trainer.state.global_step < step:
                return own(*args, **kwargs)
            if after:
                own(*args, **kwargs)
            raise KeyboardInterrupt

        setattr(owner(trainer), name, function)

    return hook


def online(trainer):
    return trainer.online


WHERE = {
    "in an update": (at(5, lambda trainer: trainer, "_agree", after=True), 4, 3),
    "at the border of a rollout": (at(6, online, "prepare"), 6, 3),
    "while drawing": (at(6, online, "_draw"), 6, 3),
    "while scoring": (at(6, online, "_score"), 6, 4),
    "after a rollout was kept": (at(6, lambda trainer: trainer.online.kept, "keep", after=True), 6, 3),
    "in a checkpoint": (at(6, online, "save", after=True), 4, 3),
}


@pytest.mark.parametrize("where", WHERE)
def test_a_run_that_was_left_goes_on_exactly(where, run, whole, tmp_path, drawn):
    """Only a rollout that was left before it was whole is drawn twice."""
    hook, resumed, calls = WHERE[where]
    cut = replace(run, work=tmp_path, parameter_hook=hook)
    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, cut)
    again = fit(0, 1, replace(cut, parameter_hook=None))
    assert again["resumed"] == resumed
    assert drawn == [15] * calls
    assert_alike(run, whole, cut, again)


def test_a_run_that_was_left_before_its_first_checkpoint_draws_nothing_again(run, whole, tmp_path, drawn):
    cut = replace(run, work=tmp_path, save_every=100, parameter_hook=at(5, lambda trainer: trainer, "training_step"))
    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, cut)
    assert len(drawn) == 2
    again = fit(0, 1, replace(cut, parameter_hook=None))
    assert again["resumed"] == 0
    assert len(drawn) == 3
    assert_alike(run, whole, cut, again)


def test_a_run_that_goes_on_from_the_checkpoint_before_draws_nothing_again(run, whole, tmp_path, drawn, caplog):
    cut = replace(run, work=tmp_path, parameter_hook=at(7, lambda trainer: trainer, "training_step"))
    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, cut)
    damage(tmp_path / "checkpoints" / "step-000006" / ckpt.WEIGHTS)
    again = fit(0, 1, replace(cut, parameter_hook=None))
    assert "step-000006 is damaged" in caplog.text
    assert again["resumed"] == 4
    assert len(drawn) == 3
    assert_alike(run, whole, cut, again)


@pytest.mark.parametrize(
    ("kind", "owner", "name"),
    [("grpo", lambda trainer: trainer, "log"), ("ppo", online, "take_said")],
    ids=["grpo, after an update", "ppo, between the pass and its update"],
)
def test_a_run_with_one_update_per_rollout_goes_on_exactly(kind, owner, name, base, tmp_path, drawn):
    settings = {"prompts_per_rollout": 5}
    run = Run(base, tmp_path / "whole", kind, steps=4, save_every=2, pack_tokens=100_000, settings=settings)
    whole = fit(0, 1, run)
    assert (whole["online"]["logps"] is None) == (kind == "grpo")
    cut = replace(run, work=tmp_path / "cut", parameter_hook=at(3, owner, name))
    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, cut)
    again = fit(0, 1, replace(cut, parameter_hook=None))
    assert again["resumed"] == 2
    assert drawn == [5] * 8
    assert same(whole["state"], again["state"])
    assert measured(run.work) == measured(cut.work)


def test_a_signal_while_scoring_stops_after_the_step(run, whole, tmp_path, drawn):
    def hook(trainer, rank):
        own = trainer.online._score

        def score(*args):
            if trainer.state.global_step == 3:
                signal.raise_signal(signal.SIGTERM)
            return own(*args)

        trainer.online._score = score

    cut = replace(run, work=tmp_path, save_every=100, parameter_hook=hook)
    with pytest.raises(Preempted):
        fit(0, 1, cut)
    again = fit(0, 1, replace(cut, parameter_hook=None))
    assert again["resumed"] == 4
    assert len(drawn) == 3
    assert_alike(run, whole, cut, again)


# --- what is kept -----------------------------------------------------------------------------------------------------


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_rollout_is_drawn_again(run, whole, tmp_path, drawn, caplog):
    cut = replace(run, work=tmp_path, parameter_hook=WHERE["after a rollout was kept"][0])
    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, cut)
    damage(tmp_path / "rollouts" / "rollout-000002" / "rollout.safetensors")
    again = fit(0, 1, replace(cut, parameter_hook=None))
    assert "rollout 3 is damaged and is drawn again" in caplog.text
    assert len(drawn) == 4
    assert_alike(run, whole, cut, again)


def test_what_other_weights_have_drawn_is_not_used(run, tmp_path, drawn):
    """A resumed run may come to a step with weights that differ by rounding; here one number differs by one bit."""
    cut = replace(run, work=tmp_path, parameter_hook=WHERE["after a rollout was kept"][0])
    with pytest.raises(KeyboardInterrupt):
        fit(0, 1, cut)

    def nudge(trainer, rank):
        own = trainer.online.prepare

        def prepare(model, step, packing):
            if step == 6:
                parameter = trainer.model.tensors("critic")["base_model.model.score.weight"]
                parameter.data.view(torch.int32)[0, 0] += 1
            return own(model, step, packing)

        trainer.online.prepare = prepare

    fit(0, 1, replace(cut, steps=7, parameter_hook=nudge))
    assert len(drawn) == 4


def test_a_digest_tells_tensors_apart():
    tensors = [torch.arange(6.0).reshape(2, 3), torch.tensor(2.0), torch.ones(3, dtype=torch.bfloat16)]
    seen = {digest_of(tensors), digest_of([t.clone() for t in tensors]), digest_of(iter(tensors))}
    assert len(seen) == 1
    seen.add(digest_of([tensors[0].t().contiguous().view(2, 3), *tensors[1:]]))
    seen.add(digest_of([torch.nextafter(tensors[0], torch.tensor(9.0)), *tensors[1:]]))
    seen.add(digest_of([*tensors[:2], tensors[2] * 2]))
    seen.add(digest_of(tensors[:2]))
    assert len(seen) == 5


def test_rollouts_that_every_checkpoint_is_beyond_are_dropped(run, tmp_path):
    seen = {}

    def hook(trainer, rank):
        trainer.keep_checkpoints = 1
        own = trainer.online.save

        def save(folder):
            own(folder)
            seen[trainer.state.global_step] = sorted(int(p.name[-6:]) for p in (tmp_path / "rollouts").iterdir())

        trainer.online.save = save

    fit(0, 1, replace(run, work=tmp_path, parameter_hook=hook))
    assert seen == {2: [0], 4: [0, 1], 6: [1], 8: [2], 9: [2]}


def test_samples_are_lines_whatever_a_completion_holds(base, tmp_path):
    """Some characters end a line for Python and not in JSON."""
    trainer = Run(base, tmp_path, "grpo", steps=1).trainer()
    trainer.fit()
    buffer = trainer.online.buffer
    shelf = KeptRollouts(tmp_path, trainer.online.tokenizer)
    shelf.tokenizer = type("Tokenizer", (), {"decode": lambda self, ids, **_: "a\u2028b\x85c\nd\re\x0bf"})()
    for number in (0, 1, 2, 1):
        shelf.show(replace(buffer, number=number))
    told = (tmp_path / kept.SAMPLES).read_text(encoding="utf-8").split("\n")
    assert told.pop() == ""
    assert [json.loads(line)["rollout"] for line in told] == [0, 0, 1, 1]
    assert json.loads(told[0])["completion"] == "a\u2028b\x85c\nd\re\x0bf"
    assert json.loads(told[0])["score"] == float(buffer.rollout.scores[0])
