"""What a recipe may do with a reward model, and what the plan says of one."""

from __future__ import annotations

import pytest

from align.recipe.plan import make_plan
from tests.recipe.test_graph import BASE, HEAD, SFT, Check, Refuse

RM = "  rm: {kind: reward, policy: sft, data: pairs}\n"
FULL = "  rm: {kind: reward, data: pairs, model: {quantization: none, adapter: none}}\n"
RECIPE = HEAD + BASE + SFT + RM + "  last: {kind: compare, candidates: [base, sft], baseline: sft, prompts: heldout}\n"


def test_a_reward_model_stands_on_its_policys_base(check: Check) -> None:
    graph = check(RECIPE)
    rm = graph.nodes["rm"]
    assert rm.parents == ("sft", "base")
    assert rm.model is not None
    assert (rm.model.base, rm.model.quantization) == ("base", "nf4")
    assert rm.model.adapter == graph.nodes["sft"].model.adapter
    full = check(RECIPE.replace(RM, FULL)).nodes["rm"]
    assert full.model is not None
    assert (full.model.base, full.model.adapter) == ("base", "none")


@pytest.mark.parametrize(
    ("old", "new", "told", "fix"),
    [
        ("kind: dpo, policy: sft", "kind: dpo, policy: rm", "stages.dpo.policy", "one of: base, sft, other"),
        ("reference: sft", "reference: rm", "stages.dpo.reference", "one of: base, sft, other"),
        ("[base, sft]", "[base, rm, sft]", "stages.last.candidates.1", "one of: base, sft, dpo, other"),
        ("baseline: sft", "baseline: rm", "stages.last.baseline", "one of: base, sft, dpo, other"),
        ("kind: reward, policy: sft", "kind: reward, policy: other", "stages.rm.policy", "one of: base, sft, dpo"),
    ],
)
def test_a_reward_model_is_no_policy(refuse: Refuse, old: str, new: str, told: str, fix: str) -> None:
    dpo = "  dpo: {kind: dpo, policy: sft, reference: sft, data: pairs}\n"
    other = "  other: {kind: reward, policy: sft, data: pairs}\n"
    message = refuse(RECIPE.replace(RM, RM + dpo + other).replace(old, new))
    name = "other" if "policy: other" in new else "rm"
    assert f"{told}: `{name}` produces a reward model, not a policy" in message
    assert fix.replace(", other", "") in message


@pytest.mark.parametrize("rm", [RM, FULL])
def test_a_reward_model_is_no_base(refuse: Refuse, rm: str) -> None:
    more = "  more: {kind: sft, data: corpus, model: {base: rm}}\n"
    message = refuse(RECIPE.replace(RM, rm + more))
    assert "stages.more.model.base: `rm` trains a reward model, it is no base" in message
    assert "one of: base" in message


@pytest.mark.parametrize("setting", ["normalise_prompts: 8", "generation: {max_new_tokens: 8}"])
def test_settings_of_samples_are_read_with_samples_alone(check: Check, refuse: Refuse, setting: str) -> None:
    message = refuse(RECIPE.replace(RM, RM.replace("data: pairs", f"data: pairs, {setting}")))
    assert f"`{setting.split(':')[0]}` has no effect: no samples are drawn" in message
    assert "write `normalise: samples`" in message
    check(RECIPE.replace(RM, RM.replace("data: pairs", f"data: pairs, normalise: samples, {setting}")))


def test_the_plan_counts_adapter_and_head(check: Check) -> None:
    rows = {row.stage: row for row in make_plan(check(RECIPE), lambda _: False, compute_bytes=4).rows}
    sft, rm = rows["sft"], rows["rm"]
    hidden = 128
    assert rm.trains
    assert rm.memory["base"] == sft.memory["base"]
    assert rm.memory["trained weights"] == sft.memory["trained weights"] + 4 * hidden
    assert rm.memory["optimizer"] == sft.memory["optimizer"] + 8 * hidden
    assert "head" not in rm.memory, "no logits are computed"
    assert "head" in sft.memory
    assert "frozen adapters" not in rm.memory
    assert rm.disk == sft.disk + 4 * hidden
