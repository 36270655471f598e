"""Which packing a model gets, that the plan says the same, and that one which cannot share a prompt falls back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3NextConfig,
    RoFormerConfig,
    StableLmConfig,
)

from align.logps import attention, engine
from align.logps.attention import NAME, kernel_of
from align.logps.engine import choose_engine, choose_packing
from align.models import RoleModel
from align.models.base import load_base
from align.recipe import build_graph, load_recipe
from align.recipe.packing import DROPOUT, PackingChoice, why_not_flat
from align.recipe.plan import make_plan

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = {"intermediate_size": 48, "num_key_value_heads": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "head_dim": 16,
}


def choose(config, **asked) -> str:
    torch.manual_seed(0)
    roles = RoleModel(AutoModelForCausalLM.from_config(config))
    choice = choose_packing(roles.causal_lm, **({"dropout": False, "wanted": "auto"} | asked))
    assert (roles.config._attn_implementation == NAME) == (choice != "rows")
    return choice


MODELS = {
    "llama": (LlamaConfig(**SMALL, **MLP), None),
    "qwen2": (Qwen2Config(**SMALL, **MLP), None),
    "qwen2-window": (
        Qwen2Config(**SMALL, **MLP, sliding_window=16, use_sliding_window=True, max_window_layers=1),
        "sl",
    ),
    "mistral": (MistralConfig(**SMALL, **MLP, sliding_window=None), None),
    "mistral-window": (MistralConfig(**SMALL, **MLP, sliding_window=16), "slides over a window of 16 tokens"),
    "gpt-neox": (GPTNeoXConfig(**SMALL, intermediate_size=48), None),
    "gemma2": (Gemma2Config(**SMALL, **MLP, head_dim=16, sliding_window=16), "capped"),
    "gemma3": (Gemma3TextConfig(**SMALL, **MLP, head_dim=16, sliding_window=16), "type sliding_attention"),
    "mamba": (MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2), "recurrent"),
    "hybrid": (Qwen3NextConfig(**SMALL, **MLP, **LINEAR), "type linear_attention"),
    "bloom": (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2), "ALiBi"),
    "stablelm": (StableLmConfig(**SMALL, **MLP), "stablelm"),
}


@pytest.mark.parametrize("name", MODELS)
def test_plan_and_engine_agree(name: str, tmp_path: Path) -> None:
    """The plan reads a file, the engine the model made from it; and a model that fits by its file is proven to fit."""
    config, reason = MODELS[name]
    planned = planned_packing(config, tmp_path)
    torch.manual_seed(0)
    found = choose_engine(RoleModel(load_base(tmp_path / "model")).causal_lm, dropout=False, wanted="auto")
    assert planned == found
    assert found.packing == ("shared" if reason is None else "rows")
    assert (reason or "") in found.why


@pytest.mark.parametrize("name", [name for name, (_, reason) in MODELS.items() if reason is not None])
def test_the_rule_forbids_no_more_than_the_model_does(name: str, tmp_path: Path, monkeypatch) -> None:
    """Without the rule, each of these fails its proof: none is kept from sharing prompts that could."""
    torch.manual_seed(0)
    lm = RoleModel(AutoModelForCausalLM.from_config(MODELS[name][0])).causal_lm
    monkeypatch.setattr(engine, "choose", lambda *_, **__: PackingChoice("shared", "blocks"))
    found = choose_engine(lm, dropout=False, wanted="auto")
    assert found.packing == "rows"
    assert found.attention == "model"
    assert found.why


def planned_packing(config: PreTrainedConfig, folder: Path) -> PackingChoice | None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # of a trained model's size, so that attention says something
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("{}\n")
    (folder / "recipe.yaml").write_text(
        "{name: r, model: {base: model}, data: {pairs: {path: pairs.jsonl, format: pairs}}, "
        "stages: {rm: {kind: reward, data: pairs}}}"
    )
    graph = build_graph(load_recipe(folder / "recipe.yaml"), folder / "home")
    (row,) = make_plan(graph, lambda fingerprint: False, device="cpu").rows
    return row.packing


def test_a_model_that_the_rule_does_not_know_is_caught_by_the_proof():
    """RoFormer's layers ask no attention function for anything, and its configuration does not tell."""
    config = RoFormerConfig(**SMALL, intermediate_size=48, is_decoder=True)
    assert why_not_flat(config.to_dict()) is None
    lm = RoleModel(AutoModelForCausalLM.from_config(config)).causal_lm
    found = choose_engine(lm, dropout=False, wanted="auto")
    assert str(found).startswith("rows: a shared prompt changes its hidden states by ")


def test_dropout_keeps_copies_of_a_prompt_apart():
    config = LlamaConfig(**SMALL, **MLP)
    assert choose(config, dropout=True) == "flat"
    assert choose(config, dropout=True, wanted="shared") == "flat"
    assert choose(config, dropout=True, wanted="flat") == "flat"


@pytest.mark.parametrize("wanted", ["rows", "flat", "shared"])
def test_what_the_recipe_asks_for(wanted):
    assert choose(LlamaConfig(**SMALL, **MLP), wanted=wanted) == wanted


def test_what_was_asked_for_and_cannot_be_is_a_warning(caplog):
    choose(MODELS["mistral-window"][0], wanted="shared")
    choose(LlamaConfig(**SMALL, **MLP), wanted="shared", dropout=True)
    choose(MODELS["mistral-window"][0])
    assert [each.getMessage() for each in caplog.records if each.name == engine.__name__] == [
        "packing shared was asked for; it is rows: its attention slides over a window of 16 tokens",
        f"packing shared was asked for; it is flat, attention blocks: {DROPOUT}",
    ]


@pytest.mark.parametrize("works", [True, False])
def test_kernels(monkeypatch, works):
    """The ragged kernel is taken where it was seen to work, and nowhere else."""
    monkeypatch.setattr(attention, "ragged_works", lambda dtype: works)
    assert kernel_of("cpu", torch.float32) == kernel_of("cpu", torch.bfloat16) == "blocks"
    assert kernel_of("cuda", torch.float32) == "blocks"
    assert kernel_of("cuda", torch.bfloat16) == ("ragged" if works else "blocks")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_ragged_kernel_does_not_work():
    assert not attention.ragged_works(torch.bfloat16)


def test_full_training_in_bf16_is_proven_at_its_own_precision():
    """Parameters are fp32 there, and what is computed is bf16: agreement to fp32's tolerance cannot be asked for."""
    torch.manual_seed(0)
    roles = RoleModel(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, **MLP)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choose_packing(roles.causal_lm, dropout=False, wanted="auto") == "shared"
