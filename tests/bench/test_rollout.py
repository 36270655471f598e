"""The measurement on tiny sizes: the gate passes, a wrong arm fails it, every arm draws the same lengths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from align.rollout import Sampled
from bench import flips, rollout
from bench.rollout import Case, World
from bench.worlds import SHAPES

CPU = torch.device("cpu")
SMALL = SHAPES["small"].quick()


def test_a_run_tells_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = rollout.main(["--shape", "small", "--quick", "--prompt", "128", "--json", str(tmp_path / "figures.json")])
    record = json.loads((tmp_path / "figures.json").read_text())
    assert code == 0
    flipped, *cases = record["cases"]
    assert flipped["flips"]["float32"]["differing"] == 0
    assert flipped["flips"]["bfloat16"]["tokens"] > 100
    assert [case["case"]["k"] for case in cases] == [1, 8]
    for case in cases:
        assert {"ours", "generate", "generate, static", "generate_batch", "ours, batches"} <= case["arms"].keys()
        for arm in case["arms"].values():
            assert arm["tokens_per_second"] == pytest.approx(case["tokens"] / arm["median"])
    told = capsys.readouterr().out
    assert "gate passed in fp32" in told
    assert "mean nothing" in told


def test_a_wrong_arm_fails_the_gate_and_nothing_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = rollout.ours

    def wrong(world: World, settings) -> list[list[list[int]]]:
        found = right(world, settings)
        return [[ids[:-1] for ids in own] for own in found]

    monkeypatch.setattr(rollout, "ours", wrong)
    monkeypatch.setattr(rollout, "generate_batch", rollout.rows)  # a second for nothing
    code = rollout.main(["--shape", "small", "--quick", "--json", str(tmp_path / "figures.json")])
    (case,) = json.loads((tmp_path / "figures.json").read_text())["cases"]
    assert code == 1
    assert case["failures"] == ["ours draws other lengths than it should", "ours is not generate"]
    assert "gate failed" in capsys.readouterr().out


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lengths_are_those_of_the_case(k: int, dtype: torch.dtype) -> None:
    case = Case(prompt=12, k=k, completions=16, mean=8, longest=24)
    world = World(SMALL, case, CPU, dtype)
    for arm in (rollout.ours, rollout.generate):
        drawn = arm(world, world.settings(batch_size=8))
        assert sum(len(ids) for own in drawn for ids in own) == world.tokens
        assert {len(ids) for own in drawn for ids in own} == set(world.lengths)
    assert len(set(world.lengths)) > 2


def test_lengths_are_lognormal() -> None:
    drawn = torch.tensor(replace(rollout.CASES[0], longest=10_000).lengths(4000), dtype=torch.float64)
    assert float(drawn.mean()) == pytest.approx(48, rel=0.02)
    assert float(drawn.std() / drawn.mean()) == pytest.approx(0.8, rel=0.05)


def test_a_token_is_compared_up_to_the_first_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {flips.MANY: [[1, 2, 3], [4, 5]], flips.FEW: [[1, 9], [4, 5]]}
    drawn = lambda *a, **_: [[Sampled(ids, [0.0] * len(ids), True) for ids in said[a[3].batch_size]]]  # noqa: E731
    monkeypatch.setattr(flips, "sample", drawn)
    found = flips.flips(None, [[7]], None, 4)
    assert (found.completions, found.differing, found.tokens) == (2, 1, 4)
    assert str(found) == "1 of 2 completions differ, 2.5e-01 per token"
