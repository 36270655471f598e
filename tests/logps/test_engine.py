"""Which packing a model gets, and that one which cannot share a prompt falls back and says so."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from align.logps import attention
from align.logps.attention import NAME, kernel_of
from align.logps.engine import choose_packing, why_not_flat
from align.models import RoleModel

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = {"intermediate_size": 48, "num_key_value_heads": 2}


def choose(config, **asked) -> str:
    torch.manual_seed(0)
    roles = RoleModel(AutoModelForCausalLM.from_config(config))
    choice = choose_packing(roles.causal_lm, **({"dropout": False, "wanted": "auto"} | asked))
    assert (roles.config._attn_implementation == NAME) == (choice != "rows")
    return choice


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(**SMALL, **MLP), None),
        (Qwen2Config(**SMALL, **MLP), None),
        (MistralConfig(**SMALL, **MLP, sliding_window=None), None),
        (MistralConfig(**SMALL, **MLP, sliding_window=16), "slides"),
        (Gemma3TextConfig(**SMALL, **MLP, head_dim=16, sliding_window=16), "sliding_attention"),
    ],
    ids=["llama", "qwen2", "mistral", "mistral-window", "gemma3"],
)
def test_the_configuration_tells(config, reason, caplog):
    caplog.set_level(logging.INFO)
    found = why_not_flat(config)
    assert (found is None) if reason is None else (reason in found)
    assert choose(config) == ("shared" if reason is None else "rows")
    assert (reason is None) or (reason in caplog.text)


def test_a_model_without_the_attention_interface_falls_back(caplog):
    """BLOOM has positions in its attention scores and takes no position ids."""
    caplog.set_level(logging.INFO)
    assert choose(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)) == "rows"
    assert "padded rows" in caplog.text


def test_dropout_keeps_copies_of_a_prompt_apart():
    config = LlamaConfig(**SMALL, **MLP)
    assert choose(config, dropout=True) == "flat"
    assert choose(config, dropout=True, wanted="shared") == "flat"
    assert choose(config, dropout=True, wanted="flat") == "flat"


@pytest.mark.parametrize("wanted", ["rows", "flat", "shared"])
def test_what_the_recipe_asks_for(wanted):
    assert choose(LlamaConfig(**SMALL, **MLP), wanted=wanted) == wanted


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
