"""Which models the decode loop takes, and that both ways of drawing give the same."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from align.models import RoleModel
from align.rollout import sample
from align.rollout.proof import why_not
from tests.rollout.plain import greedy, logps, settings

SPECIAL = {"vocab_size": 320, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0}
SMALL = SPECIAL | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
LOOP = {
    "llama": LlamaConfig(**SMALL),
    "llama, own head size": LlamaConfig(**SMALL, head_dim=24, attention_bias=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral, a wide window": MistralConfig(**SMALL, sliding_window=512),
    "phi3": Phi3Config(**SMALL),
    "gemma3, a wide window": Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=512),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, **SPECIAL),
    "gpt-neox": GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "opt": OPTConfig(
        hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64, init_std=0.2,
        max_position_embeddings=128, **SPECIAL,
    ),
}  # fmt: skip
GENERATE = {
    "mistral, a window": (MistralConfig(**SMALL, sliding_window=8), "slides over 8 tokens"),
    "gemma3, a window": (Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=8), "slides over 8 tokens"),
    "gemma2": (Gemma2Config(**SMALL, head_dim=16, sliding_window=512), "logits are capped"),
    "gemma2, attention": (
        Gemma2Config(**SMALL, head_dim=16, sliding_window=512, final_logit_softcapping=None), "softcap",
    ),
    "granite": (GraniteConfig(**SMALL, logits_scaling=2.0), "logits with a cache differ"),
    "bloom": (BloomConfig(hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2, **SPECIAL), ""),
    "mamba": (MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=8, **SPECIAL), ""),
}  # fmt: skip


def roles_of(config: PretrainedConfig) -> RoleModel:
    torch.manual_seed(0)
    roles = RoleModel(AutoModelForCausalLM.from_config(config))
    roles.add_base_role("policy")
    return roles


def reason_of(roles: RoleModel, tokens: int = 40) -> str | None:
    with torch.no_grad():
        return roles("policy", lambda m: why_not(m, tokens))


@pytest.mark.parametrize("make", LOOP)
def test_ordinary_decoders_are_decoded_by_the_loop(tokenizer, prompts, make: str) -> None:
    roles = roles_of(LOOP[make])
    assert reason_of(roles) is None
    found = sample(roles, "policy", prompts[:6], settings(temperature=0.0, max_new_tokens=8), tokenizer, completions=2)
    for prompt, own in zip(prompts, found, strict=False):
        assert [each.ids for each in own] == [greedy(roles, "policy", prompt, 8, {tokenizer.eos_token_id})] * 2
        assert own[0].logps == pytest.approx(logps(roles, "policy", prompt, own[0].ids), abs=1e-5)


@pytest.mark.parametrize("make", GENERATE)
def test_other_models_are_left_to_generate(tokenizer, prompts, make: str, caplog: pytest.LogCaptureFixture) -> None:
    config, reason = GENERATE[make]
    roles = roles_of(config)
    told = reason_of(roles)
    assert told is not None
    assert reason in told
    with caplog.at_level(logging.WARNING, logger="align.rollout.local"):
        found = sample(roles, "policy", prompts[:6], settings(max_new_tokens=8, batch_size=4), tokenizer, completions=2)
    assert told in caplog.text
    for prompt, own in zip(prompts, found, strict=False):
        for each in own:
            assert 0 < len(each.ids) == len(each.logps) <= 8
            assert each.ended == (each.ids[-1] == tokenizer.eos_token_id)
        assert own[0].logps == pytest.approx(logps(roles, "policy", prompt, own[0].ids), abs=1e-4)
    assert any(own[0].ids != own[1].ids for own in found)


def test_the_window_counts_only_for_what_is_longer(tokenizer) -> None:
    roles = roles_of(MistralConfig(**SMALL, sliding_window=32))
    assert reason_of(roles, 32) is None
    assert "slides over 32 tokens" in str(reason_of(roles, 33))


def test_the_attention_function_is_put_back(tokenizer, prompts) -> None:
    roles = roles_of(LOOP["llama"])
    before = roles.config._attn_implementation
    sample(roles, "policy", prompts[:2], settings(max_new_tokens=2), tokenizer)
    assert roles.config._attn_implementation == before == roles.base.model.config._attn_implementation


def test_a_model_is_asked_once(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    roles = roles_of(LOOP["llama"])
    assert reason_of(roles) is None
    monkeypatch.setattr("align.rollout.proof._prove", lambda _: pytest.fail("asked again"))
    assert reason_of(roles) is None
