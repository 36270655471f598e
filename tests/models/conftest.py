"""A tokenizer and tiny models of several makes, written once for all tests of the model layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerBase, Qwen2Config

from align.models import RoleModel, load_base, new_base, prepare_process, train_tokenizer
from align.spec.model import Architecture, TokenizerSettings
from tests.models.tiny import LORA, randomise

TEXTS = ["The film was slow but the cast saved it.", "Write a warm review of a western.", "I loved every minute!"] * 20


@pytest.fixture(scope="session", autouse=True)
def _process() -> None:
    prepare_process()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, TokenizerSettings(vocab_size=320))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> dict[str, Path]:
    """One folder per make: llama (tied head), qwen2 (biases, untied head), gpt2 (another layout)."""
    root = tmp_path_factory.mktemp("bases")
    shape = Architecture(hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2)
    special = {"vocab_size": len(tokenizer), "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0}
    configs = {
        "qwen2": Qwen2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            **special,
        ),
        "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **special),
    }
    models = {"llama": new_base(shape, tokenizer, seed=0)}
    for name, config in configs.items():
        torch.manual_seed(0)
        models[name] = AutoModelForCausalLM.from_config(config)
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture(params=["llama-none", "qwen2-none", "llama-nf4", "qwen2-nf4", "qwen2-int8"])
def model_kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Make and quantization."""
    return tuple(request.param.split("-"))


@pytest.fixture
def policy_and_reference(model_kind: tuple[str, str], folders: dict[str, Path]) -> RoleModel:
    """A trained policy, a frozen reference that differs from it, and the base itself."""
    name, quantization = model_kind
    roles = RoleModel(load_base(folders[name], quantization=quantization))
    roles.add_adapter("policy", settings=LORA, trainable=True, seed=1)
    randomise(roles, "policy", seed=2)
    roles.add_adapter("reference", copy_of="policy", trainable=False)
    randomise(roles, "reference", seed=3)
    roles.add_base_role("base")
    return roles
