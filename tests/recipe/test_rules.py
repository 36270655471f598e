from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.errors import RecipeError
from align.recipe.rules import RULES, check_rules, rules_table
from tests.recipe.conftest import Check

RECIPE = """
name: rules
model:
  base: base
  quantization: nf4
  adapter: {kind: lora, rank: 4, alpha: 8}
data:
  texts: {path: rows.jsonl, format: text}
  talks: {path: rows.jsonl, format: alpaca}
  pairs: {path: pairs.jsonl, format: pairs}
stages:
  base: {kind: pretrain, data: texts}
  sft: {kind: sft, data: talks}
  dpo: {kind: dpo, policy: sft, reference: sft, data: pairs}
launch: {processes: 2}
"""

ALONE = ["stages.sft.engine=trl", "stages.sft.launch={processes: 1}"]
PEER = ["stages.dpo.engine=trl", "stages.dpo.launch={processes: 1}"]
ROLLOUTS = "stages.dpo={kind: grpo, policy: sft, reference: REFERENCE, scorers: [film-reviews], prompts: pairs}"
FREE = ROLLOUTS.replace("REFERENCE", "null")


def drawn(settings: str, kind: str = "rloo") -> str:
    """A stage on rollouts that TRL trains."""
    peer = "policy: sft, reference: sft, scorers: [film-reviews], prompts: pairs, engine: trl, launch: {processes: 1}"
    return f"stages.dpo={{kind: {kind}, {peer}, {settings}}}"


BROKEN = {
    "quantised-full": (
        ["model.adapter=none"],
        "recipe.yaml:5: model.quantization",
        "stage `sft` has quantization nf4 with adapter none",
    ),
    "dropout-reference": (
        ["model.adapter.dropout=0.1"],
        "--set model.adapter.dropout=0.1",
        "stage `dpo` has dropout 0.1 with reference sft",
    ),
    "int8-reference": (
        ["model.quantization=int8"],
        "--set model.quantization=int8",
        "stage `dpo` has quantization int8 with reference sft",
    ),
    "rollout-full": (
        ["model.adapter=none", "model.quantization=none", ROLLOUTS.replace("REFERENCE", "sft")],
        "--set model.adapter=none",
        "stage `dpo` has adapter none with kind grpo",
    ),
    "rollout-dropout": (
        [FREE, "model.adapter.dropout=0.1"],
        "--set model.adapter.dropout=0.1",
        "stage `dpo` has dropout 0.1 with kind grpo",
    ),
    "rollout-int8": (
        [FREE, "model.quantization=int8"],
        "--set model.quantization=int8",
        "stage `dpo` has quantization int8 with kind grpo",
    ),
    "rollout-validation": (
        [FREE, "stages.dpo.train={validation: {fraction: 0.1}}"],
        "--set stages.dpo.train=",
        "stage `dpo` has fraction 0.1 with kind grpo",
    ),
    "merge-zero3": (
        [
            "model.quantization=none",
            "stages.dpo.model.merge_parent=true",
            "stages.dpo.launch={deepspeed: zero3, processes: 2}",
        ],
        "--set stages.dpo.launch=",
        "stage `dpo` has deepspeed zero3 with merge_parent true with quantization none",
    ),
    "pretrain-zero3": (
        ["launch.deepspeed=zero3"],
        "--set launch.deepspeed=zero3",
        "stage `base` has deepspeed zero3 with kind pretrain",
    ),
    "heads": (
        ["stages.base.architecture={heads: 3}"],
        "--set stages.base.architecture=",
        "stage `base` has heads 3 with hidden_size 128 with kv_heads unset",
    ),
    "trl-processes": (
        ["stages.sft.engine=trl"],
        "recipe.yaml:15: launch.processes",
        "stage `sft` has processes 2 with engine trl",
    ),
    "trl-deepspeed": (
        ["stages.sft.engine=trl", "stages.sft.launch={deepspeed: zero2}"],
        "--set stages.sft.launch=",
        "stage `sft` has deepspeed zero2 with engine trl",
    ),
    "trl-best": (
        [*ALONE, "stages.sft.train.validation={patience: 2}"],
        "--set stages.sft.train.validation=",
        "stage `sft` has keep last with patience 2 with engine trl",
    ),
    "trl-head": (
        [*ALONE, "model.adapter.targets=[q_proj, lm_head]"],
        "--set model.adapter.targets=",
        "stage `sft` has targets [q_proj, lm_head] with engine trl",
    ),
    "trl-reduction": (
        [*ALONE, "stages.sft.reduction=sequence_mean"],
        "--set stages.sft.reduction=sequence_mean",
        "stage `sft` has reduction sequence_mean with engine trl",
    ),
    "trl-reference": (
        [*PEER, "stages.dpo.reference=null"],
        "--set stages.dpo.reference=null",
        "stage `dpo` has reference unset with engine trl",
    ),
    "trl-smoothing": (
        [*PEER, "stages.dpo.label_smoothing=0.1"],
        "--set stages.dpo.label_smoothing=0.1",
        "stage `dpo` has label_smoothing 0.1 with loss sigmoid with engine trl",
    ),
    "trl-loss": (
        [*PEER, "stages.dpo.loss=rso", "stages.dpo.reduction=token_mean"],
        "--set stages.dpo.loss=rso",
        "stage `dpo` has loss rso with reduction token_mean with engine trl",
    ),
    "trl-kto": (
        [*PEER, "stages.dpo.kind=kto", "data.pairs.convert=unpaired", "stages.dpo.train.global_batch_size=1"],
        "--set stages.dpo.train.global_batch_size=1",
        "stage `dpo` has global_batch_size 1 with engine trl",
    ),
    "trl-ranked": (
        [*PEER, "stages.dpo={kind: reward, policy: sft, data: pairs}", *PEER, "data.pairs.format=ranked"],
        "--set stages.dpo=",
        "stage `dpo` has data pairs with engine trl",
    ),
    "trl-stop-kl": ([drawn("stop_kl: 0.1")], "--set stages.dpo=", "stage `dpo` has stop_kl 0.1 with engine trl"),
    "trl-normalise": (
        [drawn("normalise_scores: true", "grpo")],
        "--set stages.dpo=",
        "stage `dpo` has normalise_scores true with engine trl",
    ),
    "trl-score-clip": (
        [drawn("score_clip: 2.0, missing_eos: subtract")],
        "--set stages.dpo=",
        "stage `dpo` has score_clip 2.0 with missing_eos subtract with engine trl",
    ),
    "trl-drop": ([drawn("missing_eos: drop")], "--set stages.dpo=", "stage `dpo` has missing_eos drop with engine trl"),
    "trl-drop-stop": (
        [drawn("missing_eos: drop, aggregation: token_mean, generation: {stop: [end]}", "grpo")],
        "--set stages.dpo=",
        "stage `dpo` has stop [end] with missing_eos drop with engine trl",
    ),
    "trl-kl-estimator": (
        [drawn("kl_estimator: k2", "grpo")],
        "--set stages.dpo=",
        "stage `dpo` has kl_estimator k2 with engine trl",
    ),
    "trl-kl-target": ([drawn("kl_target: 3.0")], "--set stages.dpo=", "stage `dpo` has kl_target 3.0 with engine trl"),
    "trl-ratio": ([drawn("ratio: none")], "--set stages.dpo=", "stage `dpo` has ratio none with engine trl"),
    "trl-entropy": (
        [drawn("entropy_weight: 0.1")],
        "--set stages.dpo=",
        "stage `dpo` has entropy_weight 0.1 with engine trl",
    ),
}


def ids_that_apply(check: Check, *overrides: str) -> list[str]:
    graph = check(RECIPE, *overrides)
    return [rule.id for rule in RULES if any(rule.applies(node) for node in graph.nodes.values())]


def test_a_sound_recipe_passes(check: Check) -> None:
    check_rules(check(RECIPE))


def test_every_rule_is_shown_to_apply() -> None:
    assert set(BROKEN) == {rule.id for rule in RULES}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_combination_is_refused_with_its_place_values_and_fix(check: Check, rule: str) -> None:
    overrides, where, message = BROKEN[rule]
    with pytest.raises(RecipeError) as caught:
        check_rules(check(RECIPE, *overrides))
    assert ids_that_apply(check, *overrides) == [rule]
    told = str(caught.value)
    assert where in told
    assert message in told
    assert next(each for each in RULES if each.id == rule).fix in told
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["launch.deepspeed=zero2"],
        ["stages.dpo.launch={deepspeed: zero3, processes: 2}"],
        ["stages.dpo.model={merge_parent: true}", "stages.dpo.launch={deepspeed: zero3, processes: 2}"],
        ["stages.dpo.model={merge_parent: true}", "model.quantization=none"],
        ["model.adapter=none", "model.quantization=none"],
        ["stages.sft.model={adapter: {kind: lora, rank: 4, alpha: 8, dropout: 0.1}}"],
        ["stages.base.architecture={heads: 8, kv_heads: 2}"],
        [*ALONE, "stages.sft.train.validation={every_steps: 5}"],
        [*PEER, "stages.dpo.loss=robust", "stages.dpo.label_smoothing=0.1"],
        [*PEER, "stages.dpo.reduction=token_mean"],
        [drawn("normalise_advantages: true, missing_eos: subtract, epochs_per_rollout: 2")],
        [drawn("score_clip: 2.0")],
        [drawn("score_clip: 2.0, missing_eos: keep")],
        [drawn("beta: 0.0")],
        [drawn("beta: 0.0"), "stages.dpo.reference=null"],
        [drawn("missing_eos: drop, aggregation: token_mean, entropy_weight: 0.1, kl_ratio: true", "grpo")],
        [drawn("scale: none, aggregation: constant, clip_high: 0.3, generation: {top_k: 5, stop: [end]}", "grpo")],
    ],
    ids=" ".join,
)
def test_neighbours_of_the_rules_pass(check: Check, overrides: list[str]) -> None:
    check_rules(check(RECIPE, *overrides))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ("score_clip: 2.0", "grpo"),
        ("score_clip: 2.0, missing_eos: keep", "grpo"),
        ("score_clip: 0.5", "rloo"),  # what a missing end costs, -1, would be cut
    ],
)
def test_a_clip_that_trl_would_apply_otherwise_is_refused(check: Check, settings: str, kind: str) -> None:
    with pytest.raises(RecipeError, match="TRL's GRPO clips no rewards, and its RLOO"):
        check_rules(check(RECIPE, drawn(settings, kind)))


@pytest.mark.parametrize("aggregation", ["sequence_mean", "constant"])
def test_completions_that_trl_would_count_all_the_same_are_refused(check: Check, aggregation: str) -> None:
    with pytest.raises(RecipeError, match="counts those that it leaves out"):
        check_rules(check(RECIPE, drawn(f"missing_eos: drop, aggregation: {aggregation}", "grpo")))


@pytest.mark.parametrize("architecture", ["hidden_size: 100, heads: 4, kv_heads: 3", "hidden_size: 20, heads: 4"])
def test_heads_that_do_not_fit_are_refused_because_transformers_would_fail(check: Check, architecture: str) -> None:
    with pytest.raises(RecipeError, match="multiple of 2 x heads"):
        check_rules(check(RECIPE, f"stages.base.architecture={{{architecture}}}"))


def test_all_clashes_are_told_at_once(check: Check) -> None:
    with pytest.raises(RecipeError) as caught:
        check_rules(check(RECIPE, "launch.deepspeed=zero3", "model.adapter.dropout=0.2"))
    assert "kind pretrain" in str(caught.value)
    assert "dropout 0.2" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ([], "config.json and no weights"),
        (["config.json", "pytorch_model.bin"], "no weights"),
        (["model.safetensors"], "no config.json"),
    ],
)
def test_a_folder_without_a_model_is_no_base(check: Check, tmp_path: Path, files: list[str], missing: str) -> None:
    (tmp_path / "llm").mkdir()
    for name in files:
        (tmp_path / "llm" / name).write_text(json.dumps({}))
    with pytest.raises(RecipeError, match=missing) as caught:
        check_rules(check(RECIPE, "model.base=llm"))
    assert "--set model.base=llm" in str(caught.value)


SHORT = {"max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("overrides", "told", "fix"),
    [
        (
            ["stages.base.train.max_tokens=1025"],
            "--set stages.base.train.max_tokens=1025: max_tokens 1025 is more than the 1024 positions that `base` was",
            "write max_tokens: 1024 or less, or raise architecture.max_positions of stage `base`",
        ),
        (
            ["stages.dpo.train.max_tokens=1600"],
            "--set stages.dpo.train.max_tokens=1600: max_tokens 1600 is more than the 1024 positions that `base` was",
            "write max_tokens: 1024 or less, or raise architecture.max_positions of stage `base`",
        ),
        (  # through a parent that was trained in full
            [
                "stages.sft.model={adapter: none, quantization: none}",
                "stages.dpo.model={base: sft, adapter: none, quantization: none}",
                "stages.dpo.train.max_tokens=1600",
            ],
            "--set stages.dpo.train.max_tokens=1600: max_tokens 1600 is more than the 1024 positions that `base` was",
            "write max_tokens: 1024 or less",
        ),
        (  # what nobody wrote points at the stage
            [
                "stages.base.architecture.max_positions=512",
                "stages.base.train.max_tokens=512",
                "stages.dpo.train.max_tokens=512",
            ],
            "recipe.yaml:13: stages.sft.train.max_tokens: max_tokens 1024 (the default) is more than the 512 positions",
            "write max_tokens: 512 or less",
        ),
    ],
)
def test_sequences_longer_than_a_base_of_the_recipe_are_refused(
    check: Check, overrides: list[str], told: str, fix: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_rules(check(RECIPE, *overrides))
    first, second, *rest = str(caught.value).splitlines()
    assert told in first
    assert second.startswith(f"  fix: {fix}")
    assert not rest
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["stages.base.train.max_tokens=512"],
        ["stages.base.architecture.max_positions=2048", "stages.dpo.train.max_tokens=2048"],
        # What is on the Hub is known once it is loaded.
        ["stages.other={kind: sft, data: talks, model: {base: some/model}, train: {max_tokens: 100000}}"],
    ],
    ids=" ".join,
)
def test_sequences_that_fit_pass(check: Check, overrides: list[str]) -> None:
    check_rules(check(RECIPE, *overrides))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (SHORT, 64),
        ({"text_config": SHORT}, 64),
        ({"n_positions": 96}, 96),
        ({"max_position_embeddings": 64, "rope_scaling": YARN}, 256),
        ({"max_position_embeddings": 300, "rope_parameters": YARN}, 300),
        ({"max_position_embeddings": 64, "rope_parameters": {"full_attention": YARN, "sliding_attention": {}}}, 256),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "linear", "factor": 2}}, 128),
        ({"max_position_embeddings": 64, "rope_scaling": "none", "text_config": []}, 64),
    ],
)
def test_sequences_longer_than_a_folder_was_made_for_are_refused(
    check: Check, tmp_path: Path, config: dict[str, object], longest: int
) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
    (tmp_path / "llm" / "model.safetensors").touch()
    text = RECIPE.replace("data: talks}", "data: talks, model: {base: llm}, train: {max_tokens: N}}")
    text = text.replace(", reference: sft, data: pairs}", ", reference: sft, data: pairs, model: {base: llm}, TRAIN}")
    text = text.replace("TRAIN", "train: {max_tokens: 8}")
    check_rules(check(text.replace("N}}", f"{longest}}}}}")))
    with pytest.raises(RecipeError) as caught:
        check_rules(check(text.replace("N}}", f"{longest + 1}}}}}")))
    assert "recipe.yaml:13: stages.sft.train.max_tokens: " in str(caught.value)
    assert f"max_tokens {longest + 1} is more than the {longest} positions that `llm` was made for" in str(caught.value)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [4.0]}
DYNAMIC = {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "dynamic", "factor": 2}}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (DYNAMIC, 64),
        ({"text_config": DYNAMIC}, 64),
        ({"max_position_embeddings": 256, "original_max_position_embeddings": 64, "rope_scaling": LONGROPE}, 64),
        (
            {"max_position_embeddings": 256, "rope_parameters": LONGROPE | {"original_max_position_embeddings": 64}},
            64,
        ),
        ({"max_position_embeddings": 64, "rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {}}}, 64),
        (  # as Phi-3 was first published
            {
                "max_position_embeddings": 256,
                "original_max_position_embeddings": 64,
                "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [4.0]},
            },
            64,
        ),
    ],
)
def test_sequences_that_would_depend_on_their_neighbours_are_refused(
    check: Check, tmp_path: Path, config: dict[str, object], longest: int
) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
    (tmp_path / "llm" / "model.safetensors").touch()
    text = RECIPE.replace("base: base", "base: llm")
    fits = [f"stages.{name}.train.max_tokens={longest}" for name in ("sft", "dpo")]
    check_rules(check(text, *fits))
    with pytest.raises(RecipeError) as caught:
        check_rules(check(text, fits[0], f"stages.dpo.train.max_tokens={longest + 1}"))
    first, second, *rest = str(caught.value).splitlines()
    assert f"max_tokens {longest + 1} is more than the {longest} positions that `llm` was first made for" in first
    assert "depend on what else is in the batch" in first
    assert second == f"  fix: lower max_tokens to {longest}"
    assert not rest
    with pytest.raises(RecipeError, match=r"stages\.dpo\.train\.max_tokens: max_tokens 1024 \(the default\) is more"):
        check_rules(check(text, fits[0]))


def test_frequencies_that_no_batch_changes_pass(check: Check, tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "model.safetensors").touch()
    hunyuan = DYNAMIC | {"rope_scaling": {"type": "dynamic", "factor": 2, "alpha": 1000.0}}
    for config in (hunyuan, {"max_position_embeddings": 64, "rope_scaling": YARN}):
        (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
        fits = [f"stages.{name}.train.max_tokens=100" for name in ("sft", "dpo")]
        check_rules(check(RECIPE.replace("base: base", "base: llm"), *fits))


@pytest.mark.parametrize("content", ["{}", "[]", '{"max_position_embeddings": "many"}'])
def test_a_configuration_that_does_not_tell_passes(check: Check, tmp_path: Path, content: str) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text(content)
    (tmp_path / "llm" / "model.safetensors").touch()
    check_rules(check(RECIPE, "model.base=llm", "stages.sft.train.max_tokens=100000"))


def test_the_table_has_every_rule() -> None:
    lines = rules_table().splitlines()
    assert len(lines) == len(RULES) + 2
    assert all(line.count("|") == 4 for line in lines)
