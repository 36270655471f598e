"""A stage under TRL in the middle of a recipe, as a user runs it."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import Cli
from tests.e2e.test_spine import copy_of, ran

pytest.importorskip("trl", reason="TRL is an extra: pip install align[trl]")
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def losses(run: Cli, stage: str) -> list[float]:
    lines = (run.stage(stage) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_a_stage_of_the_peer_stands_in_the_same_graph(tiny_run, tmp_path):
    cli = copy_of(tiny_run, tmp_path / "trl")
    output = cli.run("--set", "stages.sft.engine=trl")
    assert [ran(output, s) for s in ("base", "sft", "dpo", "comparison")] == ["reused", "done", "done", "done"]
    assert losses(cli, "sft") == pytest.approx(losses(tiny_run, "sft"), abs=1e-4)
    # What follows starts from weights that differ by rounding.
    assert losses(cli, "dpo") == pytest.approx(losses(tiny_run, "dpo"), abs=1e-2)
    assert cli.manifest("sft")["settings"]["engine"] == "trl"
