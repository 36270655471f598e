"""What a configuration tells about packing, and what the plan says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.recipe.packing import TRL, PackingChoice, choose, kernel_for, why_not_flat
from align.recipe.plan import make_plan
from tests.recipe.conftest import Check
from tests.recipe.test_plan import SEVEN, shown

ALL = ["full_attention"] * 4
SOME = ["full_attention", "sliding_attention"] * 2

FILES: dict[str, tuple[dict[str, Any], str | None]] = {
    "nothing": ({}, None),
    "llama": ({"model_type": "llama"}, None),
    "listed": ({"layer_types": SOME, "sliding_window": 512}, "layers of type sliding_attention"),
    "listed, all ordinary": ({"layer_types": ALL, "sliding_window": 512}, None),
    "gemma 2 of 2024": ({"model_type": "gemma2", "sliding_window": 4096, "attn_logit_softcapping": 50.0}, "capped"),
    "gemma 3 of 2025": (
        {"text_config": {"model_type": "gemma3_text", "sliding_window": 1024}},
        "window of 1024 tokens",
    ),
    "qwen 2, window off": ({"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False}, None),
    "qwen 2, not said": ({"model_type": "qwen2", "sliding_window": 131072}, None),
    "qwen 2, window on": ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}, "window of 8"),
    "qwen 2, window after the last layer": (
        {
            "model_type": "qwen2",
            "sliding_window": 8,
            "use_sliding_window": True,
            "max_window_layers": 28,
            "num_hidden_layers": 28,
        },
        None,
    ),
    "mistral 0.1": ({"model_type": "mistral", "sliding_window": 4096}, "window of 4096"),
    "mistral 0.2": ({"model_type": "mistral", "sliding_window": None}, None),
    "mistral, not said": ({"model_type": "mistral"}, "window of 4096"),
    "phi 3": ({"model_type": "phi3", "sliding_window": 2047}, "window of 2047"),
    "llama 4": ({"model_type": "llama4_text", "attention_chunk_size": 8192}, "chunks of 8192 tokens"),
    "mamba": ({"model_type": "mamba", "state_size": 16}, "recurrent"),
    "jamba": ({"model_type": "jamba", "mamba_d_state": 16}, "recurrent"),
    "recurrent gemma": ({"block_types": ["recurrent", "recurrent", "attention"]}, "layers of type recurrent"),
    "rwkv": ({"model_type": "rwkv"}, "recurrent"),
    "qwen 3 next of 2025": ({"model_type": "qwen3_next", "linear_conv_kernel_dim": 4}, "recurrent"),
    "granite 4 without mamba": ({"layer_types": ["attention"] * 2, "mamba_d_state": 256}, None),
    "bloom": ({"model_type": "bloom"}, "ALiBi"),
    "any with alibi": ({"model_type": "new", "alibi": True}, "ALiBi"),
    "falcon": ({"model_type": "falcon", "alibi": False}, "falcon models"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_configuration_tells(name: str) -> None:
    config, reason = FILES[name]
    found = why_not_flat(config)
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.parametrize("wanted", ["auto", "rows", "flat", "shared"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("fits", [False, True])
def test_the_rule(wanted: Any, dropout: bool, fits: bool) -> None:
    config = {"model_type": "llama"} if fits else {"sliding_window": 8}
    found = choose(config, dropout=dropout, wanted=wanted, kernel="blocks")
    flat = "flat" if dropout or wanted == "flat" else "shared"
    assert found.packing == (flat if fits and wanted != "rows" else "rows")
    assert found.attention == ("model" if found.packing == "rows" else "blocks")
    assert ("dropout" in found.why) == (fits and dropout and wanted in ("auto", "shared"))
    assert ("slides" in found.why) == (not fits and wanted != "rows")


def test_one_completion_has_no_prompt_to_share() -> None:
    shared, rows = PackingChoice("shared", "blocks"), PackingChoice("rows", "model", "why")
    assert [shared.of_batch(kind).packing for kind in ("tokens", "unpaired", "paired", "ranked")] == [
        "flat",
        "flat",
        "shared",
        "shared",
    ]
    assert rows.of_batch("tokens") == rows


def test_kernels() -> None:
    assert [kernel_for(device, half=half) for device in ("cpu", "cuda") for half in (False, True)] == [
        "blocks",
        "blocks",
        "blocks",
        "ragged",
    ]


# --- the plan --------------------------------------------------------------------------------------------------------


def plan_of(check: Check, text: str = SEVEN, *overrides: str, **options: Any) -> dict[str, PackingChoice | None]:
    plan = make_plan(check(text, *overrides), lambda fingerprint: False, **({"device": "cpu"} | options))
    return {row.stage: row.packing for row in plan.rows}


def test_a_base_made_by_the_recipe_is_known(check: Check) -> None:
    found = plan_of(check)
    assert found == {
        "base": PackingChoice("flat", "blocks"),
        "sft": PackingChoice("flat", "blocks"),
        "dpo": PackingChoice("shared", "blocks"),
        "best": None,
    }
    text = shown(make_plan(check(SEVEN), lambda fingerprint: False, device="cpu"))
    assert "packing shared, attention blocks" in text
    assert "packing flat, attention blocks" in text


def test_what_the_recipe_says_counts(check: Check) -> None:
    assert plan_of(check, SEVEN, "stages.dpo.train.packing=rows")["dpo"] == PackingChoice("rows", "model")
    dropout = plan_of(check, SEVEN, "stages.sft.model={adapter: {dropout: 0.1}}")["sft"]
    assert dropout is not None
    assert (dropout.packing, "dropout" in dropout.why) == ("flat", True)
    assert plan_of(check, SEVEN, "stages.dpo.engine=trl")["dpo"] == TRL


def test_the_kernel_is_that_of_the_device_and_dtype(check: Check) -> None:
    def kernel(device: str, dtype: str) -> str:
        found = plan_of(check, SEVEN, f"model.dtype={dtype}", device=device)["dpo"]
        assert found is not None
        return found.attention

    assert [kernel(device, dtype) for device in ("cpu", "cuda") for dtype in ("float32", "bfloat16")] == [
        "blocks",
        "blocks",
        "blocks",
        "ragged",
    ]


def test_a_folder_is_asked_and_a_fall_back_is_told(check: Check, tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    config = {"model_type": "mistral", "sliding_window": 32}
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config))
    text = SEVEN.replace("candidates: [base, sft, dpo]", "candidates: [sft, dpo]")
    graph = check(text, "model.base=llm")
    assert "packing rows: its attention slides over a window of 32 tokens" in shown(
        make_plan(graph, lambda fingerprint: False)
    )


def test_a_base_that_is_not_here_is_said_to_be_unknown(check: Check) -> None:
    assert plan_of(check, SEVEN, "model.base=nobody/nothing-here", "model.revision=" + "a" * 40)["sft"] is None
