"""What is handed to vLLM and made of what it gives back; vLLM itself needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from align.errors import LaunchError, RecipeError
from align.models import RoleModel, new_base
from align.rollout import get_engine, vllm
from align.spec.model import Architecture
from tests.rollout.plain import logps, settings


def test_without_it_the_fix_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(LaunchError, match="not installed") as caught:
        get_engine("vllm")
    assert "engine: local" in str(caught.value.fix)


class FakeLLM:
    """Says 7 8 9, or what it would if it were stopped by 8."""

    made: list[FakeLLM] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        self.options, self.calls = options, []
        FakeLLM.made.append(self)

    def generate(self, inputs: list[dict], params: Any, lora_request: Any = None, use_tqdm: bool = True) -> list[Any]:
        adapter = lora_request and load_file(Path(lora_request.path) / "adapter_model.safetensors")
        self.calls.append((inputs, params, lora_request, adapter))
        three = SimpleNamespace(token_ids=(7, 8, 9), finish_reason="length")
        two = SimpleNamespace(token_ids=(7, 8), finish_reason="stop")
        return [SimpleNamespace(outputs=[three, two]) for _ in inputs]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    module, lora = ModuleType("vllm"), ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams = FakeLLM, SimpleNamespace
    lora.LoRARequest = lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)
    for name, each in (("vllm", module), ("vllm.lora", ModuleType("vllm.lora")), ("vllm.lora.request", lora)):
        monkeypatch.setitem(sys.modules, name, each)
    vllm._model.cache_clear()
    FakeLLM.made.clear()
    yield
    vllm._model.cache_clear()


@pytest.mark.usefixtures("fake")
def test_what_is_asked_and_what_is_made_of_it(roles: RoleModel, tokenizer, prompts) -> None:
    own = settings(temperature=0.5, top_k=9, stop=["x"], max_new_tokens=3, seed=4)
    engine = get_engine("vllm")
    found = engine.sample(roles, "policy", prompts[:2], own, tokenizer, completions=2)
    engine.sample(roles, "policy", prompts[:2], own, tokenizer, completions=2)
    (llm,) = FakeLLM.made
    (inputs, params, lora, adapter), (_, _, again, _) = llm.calls
    assert inputs == [{"prompt_token_ids": prompt} for prompt in prompts[:2]]
    assert (params.n, params.max_tokens, params.temperature, params.top_k, params.top_p) == (2, 3, 0.5, 9, 1.0)
    assert params.stop == ["x"]
    assert tokenizer.eos_token_id in params.stop_token_ids
    assert lora.number != again.number, "weights have moved meanwhile"
    assert adapter.keys() == roles.tensors("policy").keys()
    assert llm.options["max_lora_rank"] == 8
    for prompt, completions in zip(prompts, found, strict=False):
        assert [each.ids for each in completions] == [[7, 8, 9], [7, 8]]
        assert [each.ended for each in completions] == [False, True]
        for each in completions:
            assert each.logps == pytest.approx(logps(roles, "policy", prompt, each.ids, 0.5), abs=1e-4)


@pytest.mark.usefixtures("fake")
def test_what_it_cannot_do(roles: RoleModel, tokenizer, prompts) -> None:
    engine = get_engine("vllm")
    assert engine.sample(roles, "policy", [], settings(), tokenizer) == []
    with pytest.raises(LaunchError, match="ZeRO-3"):
        engine.sample(roles, "policy", prompts, settings(), tokenizer, synced=bool)
    full = RoleModel(new_base(Architecture(hidden_size=64, intermediate_size=128, layers=2), tokenizer, seed=0))
    full.train_base("policy")
    with pytest.raises(RecipeError, match="trained in full"):
        engine.sample(full, "policy", prompts, settings(), tokenizer)


def test_an_unknown_engine() -> None:
    with pytest.raises(ValueError, match="no engine 'sglang'; there are local, transformers, vllm"):
        get_engine("sglang")  # type: ignore[arg-type]
