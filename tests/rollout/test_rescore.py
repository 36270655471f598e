from __future__ import annotations

import pytest

from align.models import RoleModel, new_base
from align.rollout import sample
from align.rollout.rescore import rescored
from align.spec.model import Architecture
from tests.rollout.plain import settings


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_it_gives_what_drawing_gave(roles: RoleModel, tokenizer, prompts, temperature: float) -> None:
    found = sample(roles, "policy", prompts, settings(temperature=temperature), tokenizer, completions=2)
    ids = [[each.ids for each in own] for own in found]
    for own, values in zip(found, rescored(roles, "policy", prompts, ids, temperature), strict=True):
        for each, logps in zip(own, values, strict=True):
            assert logps == pytest.approx(each.logps, abs=2e-5)


def test_a_scalar_head_does_not_matter(tokenizer, prompts) -> None:
    roles = RoleModel(new_base(Architecture(hidden_size=64, intermediate_size=128, layers=2), tokenizer, seed=0))
    roles.add_base_role("base")
    ids = [[[5, 6, 7], [8]] for _ in prompts]
    expected = rescored(roles, "base", prompts, ids, 1.0)
    roles.add_head("base")
    assert rescored(roles, "base", prompts, ids, 1.0) == expected
