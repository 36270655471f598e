"""The measurement of RLHF's memory on tiny sizes: the gate can fail, what is counted is there, and the plan is near."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from align.models.platform import prepare_process
from align.recipe.memory import TILE_ELEMENTS
from bench import rlhf_memory
from bench.memory import held_bytes, tensors_of
from bench.rlhf_memory import DRAWING, FOUR, PARTS, PPO, SCORING, SFT, failures, measure
from bench.rlhf_roles import ROLES, Apart, Arm, Rollouts, Task, held, ppo_updates
from bench.worlds import SHAPES, Shape, build_base

CPU = torch.device("cpu")
TASK = Task(24, 8, 8, 4, 64)


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_process()
    monkeypatch.setattr("align.logps.head.TILE_ELEMENTS", TILE_ELEMENTS["cpu"])  # other tests change it


def tiny(**changes: object) -> Shape:
    return replace(SHAPES["medium"].quick(), quantized=True, half=False, **changes)


def test_a_run_tells_bytes_by_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf_memory.main(["--quick", "--json", str(tmp_path / "figures.json")]) == 0
    record = json.loads((tmp_path / "figures.json").read_text())
    assert failures(record["gate"]) == []
    assert set(record["phases"]) == {SFT, PPO, FOUR, DRAWING, SCORING}
    sft, ppo, four = (record["phases"][name] for name in (SFT, PPO, FOUR))
    assert all(set(parts) == set(PARTS) for parts in record["phases"].values())
    assert sft["base"] == ppo["base"] == four["base"] / 4
    assert ppo["adapters"] == four["adapters"] > 4 * sft["adapters"], "and two heads"
    assert ppo["gradients"] > 2 * sft["gradients"]
    assert ppo["activations"] == four["activations"], "a base more is all that a model more takes"
    assert record["packs"] == {SFT: [64, 64], PPO: [32, 32, 32, 32]}, "half the tokens for each of two roles"
    told = capsys.readouterr().out
    assert "gate passed" in told
    assert "PPO step / SFT step" in told


def test_where_one_base_and_four_differ_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Arm.on_four_bases.__func__

    def wrong(cls: type[Arm], shape: Shape, device: torch.device) -> Arm:
        arm = own(cls, shape, device)
        with torch.no_grad():
            for tensor in arm.model.models["reference"].tensors("reference").values():
                tensor.mul_(2)
        return arm

    with patch.object(Arm, "on_four_bases", classmethod(wrong)):
        assert rlhf_memory.main(["--quick", "--json", str(tmp_path / "figures.json")]) == 1
    gate = json.loads((tmp_path / "figures.json").read_text())["gate"]
    assert gate["completions"] == 0, "the policy is the same"
    assert {each.split()[0] for each in failures(gate)} >= {"tokens", "loss", "gradient"}
    told = capsys.readouterr().out
    assert "gate failed" in told
    assert "PPO step" not in told


def test_a_number_that_is_none_passes_no_gate() -> None:
    assert failures({"loss": float("nan"), "tokens": 0.0, "gradient of the policy": 2e-4}) == [
        "loss nan",
        "gradient of the policy 2.0e-04",
    ]


def live() -> int:
    gc.collect()
    return held_bytes(each for each in gc.get_objects() if isinstance(each, torch.Tensor))


@pytest.mark.slow
@pytest.mark.parametrize("bases", [1, 4])
def test_all_that_lives_is_counted(bases: int, tmp_path: Path) -> None:
    """Between two steps there are bases, adapters, heads, moments and the rollout, and no other tensor."""
    shape, before = tiny(), live()
    arm = Arm.on_four_bases(shape, CPU) if bases == 4 else Arm.on_one_base(build_base(shape, CPU), shape, CPU)
    rollouts, updates = Rollouts(arm, TASK, tmp_path), ppo_updates(arm, TASK, arm.packing())
    rollouts.prepare(arm.model, 0, updates.step)
    updates.take(rollouts.examples(0, range(TASK.trained)))
    drawn = held_bytes(t for t in vars(rollouts.buffer.rollout).values() if isinstance(t, torch.Tensor))
    drawn += held_bytes([rollouts.buffer.made.advantages, rollouts.buffer.made.returns])
    counted = arm.bases + arm.adapters + updates.states
    assert counted + drawn == pytest.approx(live() - before, abs=8192)
    assert arm.bases > 100_000
    assert arm.adapters == 4 * held_bytes(arm_adapter(arm)) + 2 * 4 * shape.hidden


def arm_adapter(arm: Arm) -> list[torch.Tensor]:
    policy = arm.model.models["policy"] if isinstance(arm.model, Apart) else arm.model
    return list(policy.tensors("policy").values())


def test_roles_on_one_base_share_it_and_four_share_nothing() -> None:
    shape = tiny()
    base = build_base(shape, CPU)
    one, four = Arm.on_one_base(base, shape, CPU), Arm.on_four_bases(shape, CPU)
    own = {t.data_ptr() for t in tensors_of(base)}
    assert own <= {t.data_ptr() for t in tensors_of(one.model)}
    storages = [{t.data_ptr() for t in tensors_of(four.model.models[role])} for role in ROLES]
    assert len(set().union(*storages)) == sum(map(len, storages))
    assert four.bases == 4 * one.bases == 4 * held(base)
    assert one.model.trainable_state().keys() == four.model.trainable_state().keys()


@pytest.mark.slow
def test_the_plan_is_near_what_is_measured() -> None:
    """Within a tenth where activations matter, as with real models."""
    shape = tiny(hidden=128, intermediate=384, layers=6, vocab=32_768)
    record = measure(shape, Task(64, 64, 8, 8, 1024), CPU)  # several tiles of logits in every pack
    assert failures(record["gate"]) == []
    for phase, planned in record["plan"].items():
        found = record["phases"][phase]
        assert sum(planned.values()) == pytest.approx(sum(found.values()), rel=0.1), phase
        for part in ("base", "adapters", "optimizer", "gradients"):
            assert planned[part] == pytest.approx(found[part], rel=0.02), (phase, part)


@pytest.mark.slow
def test_examples_that_are_too_large_for_both_roles_keep_the_memory_of_one() -> None:
    record = measure(tiny(layers=6, vocab=2048), Task(112, 16, 4, 4, 128), CPU)
    assert failures(record["gate"]) == []
    assert record["packs"] == {SFT: [128] * 4, PPO: [128] * 8}, "each pack once for the policy and once for the critic"
    sft, ppo = record["phases"][SFT], record["phases"][PPO]
    assert ppo["activations"] < 1.25 * sft["activations"], "twice as much if both were trained at once"
    # The estimate is made for real models; of one this small it only has to tell the order of magnitude.
    assert 0.7 * sum(ppo.values()) < sum(record["plan"][PPO].values()) < 2 * sum(ppo.values())
