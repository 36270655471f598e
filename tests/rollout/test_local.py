from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from align.errors import RecipeError
from align.models import RoleModel, load_base, load_tokenizer, new_base
from align.rollout import Sampled, generate, keyed_draws, kv, listed_draws, sample
from align.spec.model import Architecture, LoraSettings
from tests.models.tiny import LORA, randomise
from tests.rollout.plain import greedy, logits_after, logps, settings

SAMPLED = [{}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.5, "top_k": 7}]


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.rollout.padded.complete", lambda *_: pytest.fail("drawn by transformers' generate"))


@pytest.fixture
def stopping(tokenizer, roles: RoleModel, prompts):
    """A tokenizer whose EOS is a token that greedy completions reach, some early, some never."""
    own, tokenizer.eos_token_id = tokenizer.eos_token_id, greedy(roles, "policy", prompts[0], 24, ())[7]
    yield tokenizer
    tokenizer.eos_token_id = own


def ids_of(found: list[list[Sampled]]) -> list[list[list[int]]]:
    return [[each.ids for each in own] for own in found]


def assert_close(found: list[list[Sampled]], expected: list[list[Sampled]]) -> None:
    """Bit-identical tokens; log-probabilities to 1e-5."""
    assert ids_of(found) == ids_of(expected)
    for own, other in zip(found, expected, strict=True):
        for a, b in zip(own, other, strict=True):
            assert a.ended == b.ended
            assert a.logps == pytest.approx(b.logps, abs=1e-5)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("role", ["policy", "base"])
@pytest.mark.parametrize("k", [1, 3])
def test_greedy_in_batches_equals_one_by_one(roles: RoleModel, stopping, prompts, role: str, k: int) -> None:
    found = sample(roles, role, prompts, settings(temperature=0.0, batch_size=8), stopping, completions=k)
    expected = [greedy(roles, role, prompt, 24, {stopping.eos_token_id}) for prompt in prompts]
    assert ids_of(found) == [[ids] * k for ids in expected]
    if role == "policy":
        assert any(own[0].ended for own in found)
        assert any(len(own[0].ids) == 24 and not own[0].ended for own in found)
    for own in found:
        assert all(each.ended == (each.ids[-1] == stopping.eos_token_id) for each in own)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize(
    ("make", "quantization"), [("llama", "nf4"), ("qwen2", "nf4"), ("qwen2", "int8"), ("gpt2", "none")]
)
def test_greedy_equals_transformers(folders, prompts, make: str, quantization: str) -> None:
    """With an adapter on a base of each kind: `generate` of one prompt after the other, without padding."""
    roles = RoleModel(load_base(folders[make], quantization=quantization))
    roles.add_adapter("policy", settings=LORA, trainable=True)
    randomise(roles, "policy", seed=2)
    tokenizer = load_tokenizer(folders[make])
    found = sample(roles, "policy", prompts[:8], settings(temperature=0.0, batch_size=5), tokenizer, completions=2)
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=1)
    with torch.no_grad():
        for prompt, own in zip(prompts, found, strict=False):
            ids = torch.tensor([prompt])
            out = roles("policy", lambda m, ids=ids: m.generate(ids, generation_config=config, use_cache=True))
            assert [each.ids for each in own] == [out[0, len(prompt) :].tolist()] * 2


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("drawn", SAMPLED, ids=str)
def test_nothing_depends_on_batches_order_or_shared_prompts(roles: RoleModel, stopping, prompts, drawn: dict) -> None:
    keys = list(range(len(prompts)))
    run = lambda order, k, size: sample(  # noqa: E731
        roles, "policy", [prompts[i] for i in order], settings(**drawn, batch_size=size), stopping,
        completions=k, draws=keyed_draws(5, [keys[i] for i in order]),
    )  # fmt: skip
    expected = run(keys, 3, 72)
    assert any(each.ended for own in expected for each in own)
    for size in (1, 7, 30):
        assert_close(run(keys, 3, size), expected)
    reordered = keys[::-1]
    assert_close([own for _, own in sorted(zip(reordered, run(reordered, 3, 11), strict=True))], expected)
    assert_close(run(keys, 1, 5), [own[:1] for own in expected])
    assert_close(run(keys[4:9], 2, 64), [own[:2] for own in expected[4:9]])
    assert len({tuple(each.ids) for own in expected for each in own}) > 60


@pytest.mark.parametrize("drawn", [*SAMPLED, {"temperature": 0.0}], ids=str)
def test_log_probabilities_are_those_of_a_pass_without_cache(roles: RoleModel, tokenizer, prompts, drawn: dict) -> None:
    own = settings(**drawn, max_new_tokens=10, batch_size=3)
    for prompt, found in zip(
        prompts, sample(roles, "policy", prompts[:6], own, tokenizer, completions=2), strict=False
    ):
        for each in found:
            plain = logps(roles, "policy", prompt, each.ids, own.temperature)
            assert each.logps == pytest.approx(plain, abs=1e-5)


def test_one_completion_per_prompt_is_what_generate_gives(roles: RoleModel, tokenizer, prompts) -> None:
    expected = generate(roles, "policy", prompts, settings(seed=4), tokenizer)
    draws = listed_draws(len(prompts), settings(seed=4))
    assert ids_of(sample(roles, "policy", prompts, settings(), tokenizer, draws=draws)) == [[ids] for ids in expected]


def test_tokens_are_those_of_the_numbers(roles: RoleModel, tokenizer, prompts) -> None:
    """The rule itself, in fp64 and one prompt at a time: the slice of the cumulative distribution that holds u."""
    table = torch.rand(4, 24, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = generate(roles, "policy", prompts[:4], settings(seed=9), tokenizer)
    for i, (prompt, ids) in enumerate(zip(prompts, found, strict=False)):
        for t, token in enumerate(ids):
            cumulated = logits_after(roles, "policy", prompt + ids[:t]).double().softmax(-1).cumsum(-1)
            assert int(torch.searchsorted(cumulated, table[i, t], right=True)) == token


def test_a_stop_string_ends_a_completion_and_is_kept(roles: RoleModel, tokenizer, prompts) -> None:
    free = sample(roles, "policy", prompts, settings(batch_size=10), tokenizer, completions=2)
    strings = [tokenizer.decode(free[0][0].ids[4:6])[-2:], tokenizer.decode(free[5][1].ids[9:10])]
    found = sample(roles, "policy", prompts, settings(batch_size=10, stop=strings), tokenizer, completions=2)
    cut = 0
    for own, other in zip(found, free, strict=True):
        for each, whole in zip(own, other, strict=True):
            texts = [tokenizer.decode(whole.ids[: n + 1]) for n in range(len(whole.ids))]
            n = next((n + 1 for n, text in enumerate(texts) if any(s in text for s in strings)), len(whole.ids))
            assert each.ids == whole.ids[:n]
            assert each.logps == pytest.approx(whole.logps[:n], abs=1e-5)
            assert each.ended == (any(s in texts[n - 1] for s in strings) or whole.ended)
            cut += n < len(whole.ids)
    assert cut > 3


def test_progress_is_told(roles: RoleModel, stopping, prompts) -> None:
    told: list[tuple[int, int]] = []
    own = settings(temperature=0.0, batch_size=6)
    sample(roles, "policy", prompts, own, stopping, completions=2, tell=lambda *done: told.append(done))
    assert told[-1] == (48, 48)
    assert told == sorted(told)
    assert len(told) > 4


def test_a_prompt_is_computed_once(roles: RoleModel, stopping, prompts) -> None:
    """Prompts pass through the model once whatever k is, and a row that has ended is used again."""
    seen: list[tuple[int, int]] = []
    hook = roles.base.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        found = sample(roles, "policy", prompts, settings(batch_size=12), stopping, completions=6)
    finally:
        hook.remove()
    prefills = [shape for shape in seen if shape[1] > 1]
    assert sum(n for n, _ in prefills) == sum(len(prompt) > 2 for prompt in prompts)
    steps = len(seen) - len(prefills)
    tokens = sum(len(each.ids) for own in found for each in own)
    assert tokens < 12 * steps < 1.35 * tokens
    assert max(n for n, width in seen if width == 1) == 12


def test_prompts_that_all_have_one_token(roles: RoleModel, tokenizer) -> None:
    for k in (1, 2):
        found = sample(roles, "policy", [[5], [9], [5]], settings(temperature=0.0), tokenizer, completions=k)
        assert ids_of(found) == [[greedy(roles, "policy", [p], 24, {tokenizer.eos_token_id})] * k for p in (5, 9, 5)]


def test_a_role_with_a_scalar_head_writes_too(roles: RoleModel, tokenizer, prompts) -> None:
    base = new_base(Architecture(hidden_size=64, intermediate_size=128, layers=2), tokenizer, seed=0)
    headed = RoleModel(base)
    headed.add_base_role("policy")
    before = generate(headed, "policy", prompts[:3], settings(), tokenizer)
    headed.add_head("policy")
    assert generate(headed, "policy", prompts[:3], settings(), tokenizer) == before


def test_what_does_not_fit_into_memory_is_tried_with_fewer_rows(
    roles: RoleModel, tokenizer, prompts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = generate(roles, "policy", prompts, settings(), tokenizer)
    kept, tried = kv.KV._kept, []

    def scarce(self, part: str, *args: Any) -> Any:
        tried.append(self.sizes[part][0])
        if self.sizes[part][0] > most:
            raise torch.OutOfMemoryError("out of memory")
        return kept(self, part, *args)

    monkeypatch.setattr(kv.KV, "_kept", scarce)
    most = 8
    assert generate(roles, "policy", prompts, settings(batch_size=20), tokenizer) == expected
    assert list(dict.fromkeys(tried))[:3] == [20, 12, 8], "10 and 5, in fours"
    assert "trying 5 side by side" in caplog.text
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        generate(roles, "policy", prompts, settings(batch_size=20), tokenizer)


def test_numbers_that_do_not_suffice_are_refused(roles: RoleModel, tokenizer, prompts) -> None:
    with pytest.raises(ValueError, match="9 uniform numbers do not suffice for 24 tokens"):
        sample(roles, "policy", prompts, settings(), tokenizer, draws=keyed_draws(0, range(24), tokens=9))
    with pytest.raises(ValueError, match="without tokens"):
        sample(roles, "policy", [[3], []], settings(), tokenizer)


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
    assert sample(roles, "policy", [], settings(), tokenizer, completions=3) == []


def test_a_small_model_answers_hundreds_of_prompts_in_seconds(tokenizer) -> None:
    roles = RoleModel(new_base(Architecture(), tokenizer, seed=0))
    roles.add_adapter("policy", settings=LoraSettings(), trainable=False)
    ids = torch.randint(3, 270, (256, 40), generator=torch.Generator().manual_seed(0)).tolist()
    began = time.process_time()
    found = generate(roles, "policy", ids, settings(max_new_tokens=60), tokenizer)
    assert time.process_time() - began < 20
    assert sum(map(len, found)) > 5000
