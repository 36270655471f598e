"""On a CPU a completion is the same to the last bit, whatever is drawn beside it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase, Qwen2Config

from align.models import RoleModel
from align.models.base import load_base
from align.rollout import Sampled, keyed_draws, sample
from align.spec.model import LoraSettings
from tests.models.tiny import randomise
from tests.rollout.plain import settings

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 2000,
    "initializer_range": 0.1,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=6),
    "qwen2, heads share keys": Qwen2Config(**SIZES, num_key_value_heads=2),
}


@pytest.fixture(scope="module", params=[*CONFIGS, "llama, nf4"])
def model(request, tmp_path_factory) -> RoleModel:
    name = request.param.removesuffix(", nf4")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(CONFIGS[name])
    folder = tmp_path_factory.mktemp("base")
    base.save_pretrained(folder)
    roles = RoleModel(load_base(folder, quantization="nf4" if "nf4" in request.param else "none"))
    roles.add_adapter("policy", settings=LoraSettings(rank=8), trainable=True)
    randomise(roles, "policy", seed=1)
    return roles


def prompts_of(seed: int, n: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 70, (n,), generator=g).tolist()
    return [torch.randint(2, 2000, (length,), generator=g).tolist() for length in lengths]


def drawn(
    model: RoleModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], which: list[int], rows: int, k: int
) -> dict[int, list[Sampled]]:
    wanted = settings(max_new_tokens=14, batch_size=rows, stop=["12", "7"])
    own = [prompts[i] for i in which]
    found = sample(model, "policy", own, wanted, tokenizer, completions=k, draws=keyed_draws(3, which))
    return dict(zip(which, found, strict=True))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_completion_is_the_same_to_the_last_bit(model: RoleModel, tokenizer: PreTrainedTokenizerBase, k: int) -> None:
    """Tokens and log-probabilities: in batches of several sizes, in another order, and shared among ranks."""
    prompts = prompts_of(5, 12)
    everything = [*range(12)]
    expected = drawn(model, tokenizer, prompts, everything, 64, k)
    assert len({tuple(one.ids) for own in expected.values() for one in own}) == 12 * k
    for rows in (1, 10):
        assert drawn(model, tokenizer, prompts, everything, rows, k) == expected
    assert drawn(model, tokenizer, prompts, everything[::-1], 7, k) == expected
    for share in (everything[::2], everything[1::2], [4]):
        assert drawn(model, tokenizer, prompts, share, 64, k) == {i: expected[i] for i in share}
