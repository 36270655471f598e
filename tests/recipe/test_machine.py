"""What of a recipe follows the machine, and that no fingerprint does."""

from __future__ import annotations

import pytest
import torch

from align.recipe.machine import fitted
from align.spec.stages import CompareStage
from align.spec.train import PACK_TOKENS
from tests.recipe.conftest import Check
from tests.recipe.test_plan import SEVEN


@pytest.mark.parametrize("gpu", [False, True])
def test_a_pack_budget_that_nobody_wrote_suits_the_device(
    check: Check, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    nodes = check(SEVEN, "stages.dpo.train.pack_tokens=77").nodes
    own = PACK_TOKENS["cuda" if gpu else "cpu"]
    assert [nodes[name].stage.train.pack_tokens for name in ("base", "sft", "dpo")] == [own, own, 77]
    assert nodes["sft"].stage.train.epochs == 2, "the rest is as it was written"
    assert isinstance(nodes["best"].stage, CompareStage)
    assert fitted(nodes["best"].stage) is nodes["best"].stage


def test_the_machine_changes_no_fingerprint(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def prints(gpu: bool) -> list[str]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        return [node.fingerprint for node in check(SEVEN).nodes.values()]

    assert prints(True) == prints(False)
