"""Sizes and memory against the real thing: transformers' models, PEFT's adapters, bitsandbytes' storage, autograd."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from align.recipe.memory import training_memory
from align.recipe.sizes import cached_folder, size_of_architecture, size_of_folder
from align.spec.model import Architecture, LoraSettings, ModelSettings
from align.spec.train import LaunchSettings

GIB = 2**30
SEVEN = Architecture(hidden_size=4096, intermediate_size=11008, layers=32, heads=32, tie_embeddings=False)

ARCHITECTURES = [
    Architecture(),
    Architecture(tie_embeddings=False, heads=8, kv_heads=2, layers=3),
    SEVEN,
]


def llama_config(architecture: Architecture, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads or architecture.heads,
        tie_word_embeddings=architecture.tie_embeddings,
    )


def on_meta(config: object) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def adapter_parameters(model: torch.nn.Module, lora: LoraSettings) -> int:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM")
    return sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=["default", "grouped", "7B"])
def test_an_architecture_is_counted_as_transformers_builds_it(architecture: Architecture) -> None:
    size = size_of_architecture(architecture, 1024)
    model = on_meta(llama_config(architecture, 1024))
    assert size.parameters == sum(p.numel() for p in model.parameters())
    linears = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert size.linears == {name: shape for name, shape in linears.items() if name != "lm_head"}


@pytest.mark.parametrize("lora", [LoraSettings(rank=16), LoraSettings(rank=4, targets=["q_proj", "mlp.down_proj"])])
def test_an_adapter_is_counted_as_peft_builds_it(lora: LoraSettings) -> None:
    architecture = ARCHITECTURES[1]
    expected = adapter_parameters(on_meta(llama_config(architecture, 512)), lora)
    assert size_of_architecture(architecture, 512).adapter_parameters(lora) == expected


def test_the_published_figures_of_7b() -> None:
    size = size_of_architecture(SEVEN, 32_000)
    assert size.parameters == 6_738_415_616
    assert size.linear_parameters == 6_476_005_376
    assert size.adapter_parameters(LoraSettings(rank=16)) == 39_976_960
    assert size.adapter_parameters(LoraSettings(rank=64)) == 159_907_840
    assert size.frozen_bytes("nf4", 2) / GIB == pytest.approx(3.600, abs=5e-4)
    assert size.frozen_bytes("none", 2) / GIB == pytest.approx(50.205 / 4, abs=5e-4)


SAVED = {
    "llama": LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    ),
    "qwen2": Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "qwen3": Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    ),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}  # fmt: skip


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_model_is_counted_from_its_headers(kind: str, shard: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(SAVED[kind])
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "40KB")
    size = size_of_folder(tmp_path)
    assert size is not None
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert (size.hidden, size.vocabulary) == (32, 300)
    assert size.layers == model.config.num_hidden_layers
    lora = LoraSettings(rank=4)
    assert size.adapter_parameters(lora) == adapter_parameters(model, lora)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": "{}"},
        {"config.json": "{}", "model.safetensors": "short"},
        {"config.json": "{}", "model.safetensors": "\x08\0\0\0\0\0\0\0not json"},
        {"config.json": "not json"},
        {"config.json": "{}", "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../x"}})},
    ],
)
def test_a_folder_that_does_not_tell_has_no_size(files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert size_of_folder(tmp_path) is None


def test_a_model_saved_in_quantised_form_has_no_size(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(SAVED["llama"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    assert size_of_folder(tmp_path) is None


def test_a_hub_model_is_looked_up_in_the_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = ModelSettings(base="some/model")
    assert cached_folder(model) is None
    assert cached_folder(ModelSettings(base="no/such/name")) is None
    repository, commit = tmp_path / "models--some--model", "a" * 40
    for path, text in (("refs/main", commit), (f"snapshots/{commit}/config.json", "{}")):
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text(text)
    assert cached_folder(model) == repository / "snapshots" / commit
    assert cached_folder(ModelSettings(base="some/model", revision="other")) is None


# --- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_frozen_bytes_are_what_is_loaded(quantization: str, tmp_path: Path) -> None:
    from align.models.base import load_base

    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    size = size_of_folder(tmp_path)
    assert size is not None
    model = load_base(tmp_path, quantization=quantization, dtype="float32")
    held = 0
    for parameter in model.parameters():
        held += parameter.untyped_storage().nbytes()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            held += sum(t.nbytes for t in (state.absmax, state.state2.absmax))
        if getattr(parameter, "SCB", None) is not None:
            held += parameter.SCB.nbytes
    assert size.frozen_bytes(quantization, 4) == pytest.approx(held, rel=0.005)


MIXED = [("none", 1), ("none", 2), ("zero1", 4), ("zero2", 4), ("zero3", 4)]


def parts(adapter: LoraSettings | str, deepspeed: str = "none", processes: int = 1, **model: object) -> dict[str, int]:
    return training_memory(
        size_of_architecture(SEVEN, 32_000),
        ModelSettings(base="b", adapter=adapter, **model),
        LaunchSettings(processes=processes, deepspeed=deepspeed),
        pack_tokens=8192,
        compute_bytes=2,
    )


def states(found: dict[str, int]) -> float:
    return sum(found.get(name, 0) for name in ("trained weights", "gradients", "optimizer")) / GIB


def test_adam_takes_sixteen_bytes_per_trained_parameter_and_zero_divides_them() -> None:
    """The arithmetic of mixed-precision Adam: 2 + 2 + 12 with DeepSpeed, 4 + 4 + 8 without."""
    whole = 6_738_415_616 * 16 / GIB
    assert whole == pytest.approx(100.41, abs=0.01)
    assert states(parts("none")) == pytest.approx(whole)
    assert states(parts("none", processes=2)) == pytest.approx(whole * 20 / 16), "DDP reduces a copy of the gradients"
    assert states(parts("none", "zero1", 8)) == pytest.approx(whole * (2 + 2 + 12 / 8) / 16)
    assert states(parts("none", "zero2", 8)) == pytest.approx(whole * (2 + (2 + 12) / 8) / 16)
    assert states(parts("none", "zero3", 8)) == pytest.approx(whole / 8)
    assert states(parts(LoraSettings(rank=16))) == pytest.approx(0.5957, abs=1e-4)


def test_only_zero3_divides_the_base_and_only_an_adapter_has_one() -> None:
    alone = parts(LoraSettings(), quantization="nf4")["base"]
    for deepspeed, processes in MIXED:
        found = parts(LoraSettings(), deepspeed, processes, quantization="nf4")
        assert found["base"] == (alone // 4 if deepspeed == "zero3" else alone)
        assert ("gathered" in found) == (deepspeed == "zero3")
    assert "base" not in parts("none")


def kept_for_backward(layers: int, dtype: torch.dtype, kind: str, checkpointing: bool) -> tuple[int, int]:
    """Bytes that autograd saves in a forward pass of a Llama body, and the estimate of them."""
    architecture = Architecture(hidden_size=192, intermediate_size=512, layers=layers, heads=6, kv_heads=2)
    model = AutoModelForCausalLM.from_config(llama_config(architecture, 64), dtype=dtype)
    adapter: LoraSettings | str = "none"
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        adapter = LoraSettings(rank=8, alpha=16)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if "lora_" in name else parameter.data
        model = model.base_model.model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows, tokens = 4, 128
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=torch.zeros(rows, tokens, dtype=torch.long), use_cache=False)
    estimate = training_memory(
        size_of_architecture(architecture, 64),
        ModelSettings(base="b", adapter=adapter, gradient_checkpointing=checkpointing),
        LaunchSettings(),
        pack_tokens=rows * tokens,
        compute_bytes=dtype.itemsize,
    )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), estimate["activations"]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_more_keeps_what_is_estimated(dtype: torch.dtype, kind: str, checkpointing: bool) -> None:
    (few, few_estimated), (many, many_estimated) = (
        kept_for_backward(layers, dtype, kind, checkpointing) for layers in (2, 6)
    )
    assert many_estimated - few_estimated == pytest.approx(many - few, rel=0.1)


def test_tiles_and_passes_are_those_of_the_engines() -> None:
    from align.logps.head import TILE_ELEMENTS, TILE_ELEMENTS_CUDA
    from align.recipe import memory
    from align.rollout.loop import PREFILL_TOKENS

    assert memory.TILE_ELEMENTS == {"cpu": TILE_ELEMENTS, "cuda": TILE_ELEMENTS_CUDA}
    assert memory.PREFILL_TOKENS == PREFILL_TOKENS


@pytest.mark.parametrize("entropy", ["none", "metric", "bonus"])
def test_logits_exist_as_often_as_is_estimated(entropy: str) -> None:
    from align.logps import head
    from align.recipe.memory import TILE_COPIES
    from bench.memory import peak_bytes

    tile, vocabulary, hidden = 64, 4096, 16
    weight, states = torch.randn(vocabulary, hidden), torch.randn(4 * tile, hidden, requires_grad=True)
    reading = head._Reading(0.7, entropy)

    def run() -> None:
        head._FrozenHead.apply(states, torch.zeros(4 * tile, dtype=torch.long), weight, None, tile, reading)

    copies = peak_bytes(run, torch.device("cpu")) / (4 * tile * vocabulary)
    assert copies == pytest.approx(TILE_COPIES[entropy], rel=0.06)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_p": 0.9}])
def test_sampled_logits_exist_as_often_as_is_estimated(settings: dict[str, float]) -> None:
    from align.recipe.memory import SAMPLED_COPIES
    from align.rollout.sampling import Sampler
    from align.spec.stages import GenerationSettings
    from bench.memory import peak_bytes

    logits, draws = torch.randn(16, 8192), torch.rand(16, dtype=torch.float64)
    sampler = Sampler(GenerationSettings(**settings))
    copies = peak_bytes(lambda: sampler(logits, draws), torch.device("cpu")) / logits.nbytes
    expected = SAMPLED_COPIES["likeliest" if "top_p" in settings else "all"]
    assert expected - 1.1 < copies < expected + 0.1, "without a temperature there is one less"
