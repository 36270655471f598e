from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from align.errors import AlignError, LaunchError, RecipeError
from align.models import compute_dtype, load_base, new_base
from align.spec.model import Architecture
from tests.models.tiny import logits, token_ids


@pytest.mark.parametrize(
    ("quantization", "layer"), [("none", "Linear"), ("int8", "Linear8bitLt"), ("nf4", "Linear4bit")]
)
def test_quantization_reaches_linear_layers_alone(folders: dict[str, Path], quantization: str, layer: str) -> None:
    base = load_base(folders["qwen2"], quantization=quantization)
    kinds = {name: type(module).__name__ for name, module in base.named_modules()}
    assert kinds["model.layers.0.self_attn.q_proj"] == kinds["model.layers.1.mlp.down_proj"] == layer
    assert kinds["lm_head"] == "Linear"
    others = [base.lm_head.weight, base.model.embed_tokens.weight, base.model.norm.weight]
    assert {tensor.dtype for tensor in others} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not base.training
    assert not base.config.use_cache
    if quantization == "nf4":
        weight = base.model.layers[0].self_attn.q_proj.weight
        assert weight.quant_state.quant_type == "nf4"
        assert weight.quant_state.nested, "double quantization"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_dtype_is_the_compute_dtype(folders: dict[str, Path], quantization: str) -> None:
    base = load_base(folders["llama"], quantization=quantization, dtype="bfloat16")
    with torch.no_grad():
        assert logits(base, token_ids()).dtype == torch.bfloat16
    assert base.model.embed_tokens.weight.dtype == torch.bfloat16


def test_loading_twice_gives_the_same_numbers(folders: dict[str, Path]) -> None:
    with torch.no_grad():
        one, two = (logits(load_base(folders["qwen2"], quantization="nf4"), token_ids()) for _ in range(2))
    assert torch.equal(one, two)


def test_auto_dtype_is_full_precision_without_a_gpu() -> None:
    expected = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    assert compute_dtype("auto") == expected
    assert compute_dtype("bfloat16") == torch.bfloat16


def test_missing_models_are_told(tmp_path: Path, folders: dict[str, Path]) -> None:
    cases: list[tuple[str | Path, type[AlignError], str]] = [
        (tmp_path, RecipeError, "no causal LM can be read from"),
        (tmp_path / "absent", RecipeError, "there is no folder"),
        ("./absent", RecipeError, "there is no folder"),
        ("nobody/nothing", LaunchError, "no causal LM 'nobody/nothing' on the Hub"),
    ]
    for source, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            load_base(source)
        assert caught.value.where == "model.base"
        assert caught.value.fix


def test_pickled_weights_are_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="safetensors"):
        load_base(tmp_path)


def test_new_base_depends_on_its_seed_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    def weights(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        state = torch.random.get_rng_state()
        base = new_base(Architecture(hidden_size=32, layers=1), tokenizer, seed=seed)
        assert torch.equal(state, torch.random.get_rng_state())
        return base.state_dict()

    one, again, other = weights(0, 0), weights(0, 5), weights(1, 0)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_new_base_has_the_shape_it_was_given(tokenizer: PreTrainedTokenizerBase) -> None:
    shape = Architecture(
        hidden_size=64, intermediate_size=96, layers=3, heads=8, kv_heads=2, max_positions=256, tie_embeddings=False
    )
    base = new_base(shape, tokenizer, seed=0)
    config = base.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 96, 3)
    assert (config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings) == (8, 2, 256)
    assert base.lm_head.weight is not base.model.embed_tokens.weight
    assert config.vocab_size == len(tokenizer)
    assert base.generation_config.eos_token_id == config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id != config.eos_token_id


def test_process_is_prepared() -> None:
    """In a process of its own: threads, determinism, and no import of bitsandbytes, which takes seconds."""
    code = """
import os, sys, torch
from align.models.platform import prepare_process
torch.set_num_threads(2)
os.environ["OMP_NUM_THREADS"] = "2"
prepare_process()
print(torch.get_num_threads())
del os.environ["OMP_NUM_THREADS"]
os.environ["LOCAL_WORLD_SIZE"] = "4096"
prepare_process()
print(torch.get_num_threads())
prepare_process.__wrapped__()
print(torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), os.environ["DS_ACCELERATOR"])
print(sorted({"bitsandbytes", "peft", "deepspeed"} & set(sys.modules)))
"""
    env = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2", "2", "1 True cpu", "[]"], done.stderr
