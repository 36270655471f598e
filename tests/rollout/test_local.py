from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from align.errors import RecipeError
from align.models import RoleModel, new_base, prepare_process, train_tokenizer
from align.rollout import generate
from align.spec.model import Architecture, LoraSettings, TokenizerSettings
from align.spec.stages import GenerationSettings

TEXTS = ["The film was slow but the cast saved it.", "I loved every minute of this western!"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    prepare_process()
    return train_tokenizer(TEXTS, TokenizerSettings(vocab_size=320))


@pytest.fixture(scope="module")
def roles(tokenizer: PreTrainedTokenizerBase) -> RoleModel:
    """Two policies of one base whose heads are scaled up, so that their distributions are far from uniform."""
    base = new_base(Architecture(hidden_size=64, intermediate_size=128, layers=2), tokenizer, seed=0)
    base.model.norm.weight.data.mul_(6)
    roles = RoleModel(base)
    roles.add_adapter("policy", settings=LoraSettings(rank=8), trainable=True)
    for name, tensor in roles.tensors("policy").items():
        if "lora_B" in name:
            tensor.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    roles.add_base_role("base")
    return roles


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (24,), generator=generator).tolist()
    return [torch.randint(3, 270, (n,), generator=generator).tolist() for n in lengths]


def settings(**changes) -> GenerationSettings:
    return GenerationSettings(**{"max_new_tokens": 24, **changes})


@torch.no_grad()
def greedy(roles: RoleModel, role: str, prompt: list[int], limit: int, eos: int) -> list[int]:
    """One prompt at a time, without cache, mask or padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        logits = roles(role, lambda m: m(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(logits.argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("role", ["policy", "base"])
def test_greedy_in_batches_equals_one_by_one(roles: RoleModel, tokenizer, prompts, role: str) -> None:
    eos = greedy(roles, role, prompts[0], 24, -1)[7]  # a token that is reached on the way
    stopping = settings(temperature=0.0, batch_size=8)
    own, tokenizer.eos_token_id = tokenizer.eos_token_id, eos
    try:
        found = generate(roles, role, prompts, stopping, tokenizer)
    finally:
        tokenizer.eos_token_id = own
    expected = [greedy(roles, role, prompt, 24, eos) for prompt in prompts]
    assert found == expected
    assert any(completion[-1] == eos for completion in found)
    assert any(len(completion) == 24 for completion in found)


@pytest.mark.parametrize("drawn", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}], ids=["plain", "top_p"])
def test_same_call_same_completions_whatever_the_batches(roles: RoleModel, tokenizer, prompts, drawn: dict) -> None:
    torch.manual_seed(1)
    first = generate(roles, "policy", prompts, settings(**drawn, batch_size=24), tokenizer)
    state = torch.random.get_rng_state()
    assert generate(roles, "policy", prompts, settings(**drawn, batch_size=5), tokenizer) == first
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state is left alone"
    assert generate(roles, "policy", prompts, settings(**drawn, seed=1), tokenizer) != first
    assert generate(roles, "base", prompts, settings(**drawn), tokenizer) != first
    again = generate(roles, "policy", [prompts[3]] * 8, settings(**drawn), tokenizer)
    assert len({tuple(completion) for completion in again}) > 1, "equal prompts get draws of their own"


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_tokens_follow_the_distribution(roles: RoleModel, tokenizer, prompts, top_p: float) -> None:
    n, prompt = 4000, prompts[0]
    one = settings(max_new_tokens=1, temperature=1.5, top_p=top_p, batch_size=500)
    drawn = Counter(completion[0] for completion in generate(roles, "policy", [prompt] * n, one, tokenizer))
    with torch.no_grad():
        logits = roles("policy", lambda m: m(input_ids=torch.tensor([prompt])).logits[0, -1]) / 1.5
    expected, order = logits.softmax(-1).sort(descending=True)
    kept = int((expected.cumsum(0) < top_p).sum()) + 1 if top_p < 1 else len(expected)
    expected = expected[:kept] / expected[:kept].sum()
    assert set(drawn) <= set(order[:kept].tolist())
    frequency = torch.tensor([drawn[token] / n for token in order[:kept].tolist()])
    assert 0.5 * (frequency - expected).abs().sum() < 0.5 * (2 * kept / torch.pi / n) ** 0.5 * 1.3, "total variation"


def test_the_models_own_generation_config_does_not_count(roles: RoleModel, tokenizer, prompts) -> None:
    expected = generate(roles, "policy", prompts, settings(temperature=0.0), tokenizer)
    own = roles.base.generation_config
    try:
        roles.base.generation_config.update(repetition_penalty=9.0, no_repeat_ngram_size=1, max_length=3)
        assert generate(roles, "policy", prompts, settings(temperature=0.0), tokenizer) == expected
        assert roles.base.generation_config is own
    finally:
        own.update(repetition_penalty=None, no_repeat_ngram_size=None, max_length=None)


def test_mode_is_restored_and_checkpointing_does_not_matter(tokenizer, prompts) -> None:
    base = new_base(Architecture(hidden_size=64, intermediate_size=128, layers=2), tokenizer, seed=0)
    roles = RoleModel(base, gradient_checkpointing=True)
    roles.add_adapter("policy", settings=LoraSettings(rank=8, dropout=0.5), trainable=True)
    expected = generate(roles, "policy", prompts, settings(), tokenizer)
    roles.train()
    assert generate(roles, "policy", prompts, settings(), tokenizer) == expected
    assert all(module.training for module in roles.modules())


def test_too_long_a_prompt_is_told(roles: RoleModel, tokenizer) -> None:
    with pytest.raises(RecipeError, match="1010 tokens and 24 new ones do not fit") as caught:
        generate(roles, "policy", [[5] * 1010], settings(), tokenizer)
    assert "at most 14" in caught.value.fix


def test_no_prompts_no_completions(roles: RoleModel, tokenizer) -> None:
    assert generate(roles, "policy", [], settings(), tokenizer) == []


def test_a_small_model_answers_hundreds_of_prompts_in_seconds(tokenizer) -> None:
    roles = RoleModel(new_base(Architecture(), tokenizer, seed=0))
    roles.add_adapter("policy", settings=LoraSettings(), trainable=False)
    ids = torch.randint(3, 270, (256, 40), generator=torch.Generator().manual_seed(0)).tolist()
    began = time.process_time()
    found = generate(roles, "policy", ids, settings(max_new_tokens=60), tokenizer)
    assert time.process_time() - began < 20
    assert sum(map(len, found)) > 5000
