"""The pass of the only update of a rollout, which says what advantages are made of and is learnt from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from align.training import online as making
from align.training.first_pass import FirstPass
from align.training.rollout_step import RolloutStep
from tests.training.test_online import counted, lines
from tests.training.worlds import Run, fit, save_tiny_base

ONE_UPDATE = {"prompts_per_rollout": 5}
ROLES = {"ppo": ["policy", "critic"], "rloo": ["policy"], "reinforce_pp": ["policy"]}
"""Methods that take the KL off the reward, and the roles they would run before the update."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def runs(monkeypatch) -> list[RolloutStep]:
    """Every pass of a pack that is learnt from."""
    found, own = [], RolloutStep.run

    def run(step, *args):
        found.append(step)
        return own(step, *args)

    monkeypatch.setattr(RolloutStep, "run", run)
    return found


@pytest.mark.parametrize("kind", ROLES)
def test_one_pack_is_run_once_and_learnt_as_if_it_were_run_twice(kind, base, tmp_path, monkeypatch, runs):
    roles = counted(monkeypatch)
    run = Run(base, tmp_path / "once", kind, "nf4", steps=3, pack_tokens=100_000, settings=ONE_UPDATE)
    once = fit(0, 1, replace(run, checkpointing=True))
    assert roles == ["reference", "reward"] * 3
    assert len(runs) == 3
    roles.clear()
    monkeypatch.setattr(FirstPass, "of", lambda *_: None)
    twice = fit(0, 1, replace(run, work=tmp_path / "twice"))
    assert sorted(roles[: len(ROLES[kind]) + 2]) == sorted(["reference", "reward", *ROLES[kind]])
    assert len(runs) == 6
    assert once["losses"] == pytest.approx(twice["losses"], abs=1e-5)
    assert once["grad_norms"] == pytest.approx(twice["grad_norms"], rel=1e-4)
    for name in ("logps", "values", "advantages", "returns"):
        assert (once["online"][name] is None) == (twice["online"][name] is None)
        assert once["online"][name] is None or once["online"][name] == pytest.approx(twice["online"][name], abs=1e-4)
    assert all(once["state"][k] == pytest.approx(twice["state"][k], abs=2e-4) for k in twice["state"])
    told = [line for line in lines(run.work) if "loss" in line]
    assert all(line["policy/approx_kl"] == 0 for line in told), "the old policy is the one that is trained"


@pytest.mark.parametrize(
    "changed",
    [
        {"pack_tokens": 40},
        {"texts": 4, "settings": {**ONE_UPDATE, "ptx": "x"}},
        {"settings": {"prompts_per_rollout": 5, "epochs_per_rollout": 2}},
        {"settings": {"prompts_per_rollout": 10}},
    ],
    ids=["several packs", "texts", "two epochs", "two parts"],
)
def test_where_the_update_is_more_than_one_pack_the_roles_are_run_before(changed, base, tmp_path, monkeypatch):
    roles = counted(monkeypatch)
    run = Run(base, tmp_path, "ppo", steps=1, pack_tokens=100_000, settings=ONE_UPDATE)
    fit(0, 1, replace(run, **changed))
    assert roles == ["policy", "reference", "critic", "reward"]


def test_what_was_said_is_learnt_from_once(base, tmp_path):
    trainer = Run(base, tmp_path, "ppo", steps=1, pack_tokens=100_000, settings=ONE_UPDATE).trainer()
    trainer.online.prepare(trainer.model, 0, trainer.step)
    (logps, entropy), values = trainer.online.take_said()
    buffer = trainer.online.buffer
    assert isinstance(trainer.online, making.Online)
    assert logps.requires_grad
    assert values.requires_grad
    assert not entropy.requires_grad
    assert len(logps) == len(values) == sum(map(len, buffer.completions))
    assert sorted(logps.tolist()) == sorted(buffer.rollout.logps.tolist())
    assert trainer.online.take_said() is None
