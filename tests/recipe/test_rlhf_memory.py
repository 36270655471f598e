"""What the plan says of the memory of stages that draw: the published figures at 7B, and the larger of two phases."""

from __future__ import annotations

import pytest

from align.recipe import Graph
from align.recipe.memory import Parts, generation_memory, training_memory
from align.recipe.plan import PlanRow, make_plan
from align.recipe.seats import UPDATING, at_its_peak, largest_example
from align.recipe.sizes import ModelSize, size_of_architecture
from align.spec.model import Architecture, LoraSettings, ModelSettings
from align.spec.stages import GenerationSettings
from align.spec.train import LaunchSettings
from tests.recipe.conftest import Check

GIB = 2**30

SEVEN = """
name: seven
model: {base: base, quantization: nf4, adapter: {rank: 16, alpha: 32}}
data:
  texts: {generator: film-reviews, part: demonstrations, rows: 200, format: prompt_completion}
  pairs: {generator: film-reviews, part: preferences, rows: 200, format: pairs}
stages:
  base:
    kind: pretrain
    data: texts
    architecture: {hidden_size: 4096, intermediate_size: 11008, layers: 32, heads: 32, tie_embeddings: false}
    tokenizer: {vocab_size: 32000}
  sft: {kind: sft, data: texts}
  rm: {kind: reward, policy: sft, data: pairs}
  ppo: {kind: ppo, policy: sft, reference: sft, reward: rm, prompts: texts, train: &train {max_tokens: 256}}
  rloo: {kind: rloo, policy: sft, reference: sft, reward: rm, prompts: texts, train: *train}
"""

VECTOR = {
    "params": 6738415616,
    "linear": 6476005376,
    "full_mixed_adam_gib": 100.410217,
    "four_full_copies_gib": 225.922989,
    "four_bf16_frozen_gib": 50.205109,
    "nf4_dq_base_gib": 3.600113,
    "four_nf4_bases_gib": 14.400452,
    "lora_r16": 39976960,
    "lora_r64": 159907840,
    "adapter_trainable_gib_r16": 0.595703,
    "adapter_trainable_gib_r64": 2.382812,
    "shared_base_4_adapters_gib_r16": 4.940445,
    "shared_base_4_adapters_gib_r64": 8.961441,
    "ratio_full_over_shared_r64": 25.210565,
}
"""Four-model RLHF with LLaMA-7B (V 32,000): closed form, and parameters counted on transformers' and PEFT's classes."""


@pytest.fixture
def seven() -> ModelSize:
    architecture = Architecture(hidden_size=4096, intermediate_size=11008, layers=32, heads=32, tie_embeddings=False)
    return size_of_architecture(architecture, 32_000)


def states(size: ModelSize, adapter: LoraSettings | str, deepspeed: str = "zero1", **options: object) -> float:
    """GiB of weights, gradients and moments; mixed precision as DeepSpeed has it, unless another launch is named."""
    found = training_memory(
        size,
        ModelSettings(base="b", quantization="none" if adapter == "none" else "nf4", adapter=adapter),
        LaunchSettings(deepspeed=deepspeed),
        pack_tokens=1,
        compute_bytes=2,
        **options,
    )
    moving = ("activations", "head", "backward", "autocast")
    return sum(bytes_ for name, bytes_ in found.items() if name not in moving) / GIB


def test_the_vector_of_four_models_at_7b(seven: ModelSize) -> None:
    r16, r64 = (LoraSettings(rank=rank) for rank in (16, 64))
    full, frozen, base = states(seven, "none"), seven.frozen_bytes("none", 2) / GIB, seven.frozen_bytes("nf4", 2) / GIB
    heads = 4096 * 16 / GIB
    shared = {
        rank: states(seven, lora, critic=True, frozen_adapters=2) - heads for rank, lora in ((16, r16), (64, r64))
    }
    four = 2 * full + 2 * frozen
    found = {
        "params": seven.parameters,
        "linear": seven.linear_parameters,
        "full_mixed_adam_gib": full,
        "four_full_copies_gib": four,
        "four_bf16_frozen_gib": 4 * frozen,
        "nf4_dq_base_gib": base,
        "four_nf4_bases_gib": 4 * base,
        "lora_r16": seven.adapter_parameters(r16),
        "lora_r64": seven.adapter_parameters(r64),
        "adapter_trainable_gib_r16": states(seven, r16) - base,
        "adapter_trainable_gib_r64": states(seven, r64) - base,
        "shared_base_4_adapters_gib_r16": shared[16],
        "shared_base_4_adapters_gib_r64": shared[64],
        "ratio_full_over_shared_r64": four / shared[64],
    }
    assert found == pytest.approx(VECTOR, rel=1e-6)


def test_without_deepspeed_frozen_adapters_are_fp32(seven: ModelSize) -> None:
    own = states(seven, LoraSettings(rank=16), "none", critic=True, frozen_adapters=2)
    assert own - 4096 * 16 / GIB == pytest.approx(4.940445 + 2 * 2 * 39976960 / GIB, rel=1e-6)


# --- phases ------------------------------------------------------------------------------------------------------


def rows_of(graph: Graph, device: str = "cpu") -> dict[str, PlanRow]:
    plan = make_plan(graph, lambda fingerprint: False, compute_bytes=2, device=device)
    return {row.stage: row for row in plan.rows}


def kept(parts: Parts) -> Parts:
    return {name: bytes_ for name, bytes_ in parts.items() if name in ("base", "trained weights", "optimizer")}


def test_a_stage_on_rollouts_takes_what_its_larger_phase_takes(check: Check) -> None:
    drawing = rows_of(check(SEVEN))["ppo"].memory
    assert drawing["keys and values"] == 64 * 2 * 128 * GIB // 2048, "half a MiB per token"
    assert not set(UPDATING) & set(drawing)
    updating = rows_of(check(SEVEN, "stages.ppo.generation.batch_size=1"))["ppo"].memory
    assert {"gradients", "activations"} < set(updating)
    assert "keys and values" not in updating
    assert kept(drawing) == kept(updating)
    assert sum(drawing.values()) > sum(updating.values())


def test_no_more_rows_are_drawn_than_a_rank_has_completions(check: Check) -> None:
    def keys(stage: str, *overrides: str) -> int:
        return rows_of(check(SEVEN, *overrides))[stage].memory["keys and values"]

    large = "stages.{}.generation={{batch_size: 512, max_new_tokens: 512}}"
    ppo, rloo = keys("ppo", large.format("ppo")), keys("rloo", large.format("rloo"))
    assert rloo == 4 * ppo
    assert keys("rloo", large.format("rloo"), "launch.processes=2") == rloo // 2
    assert keys("rloo", large.format("rloo"), "stages.rloo.prompts_per_rollout=32") == rloo // 2


def test_the_note_tells_both_phases(check: Check) -> None:
    row = rows_of(check(SEVEN))["ppo"]
    (note,) = [each for each in row.notes if each.startswith("one base")]
    assert note.startswith(
        "one base of 3.60 GiB: policy 610.0 MiB; critic 610.1 MiB; reference 152.5 MiB; reward model"
    )
    assert "; an update " in note
    assert note.endswith(f"; drawing {(8 * GIB + 4 * 8192 * (4096 + 11008) * 2) / GIB:.2f} GiB")


def test_a_reward_model_on_its_own_base_is_counted_once(check: Check) -> None:
    apart = "stages.rm={kind: reward, data: pairs, model: {quantization: none}}"
    shared, own = (rows_of(check(SEVEN, *each))["ppo"].memory for each in ((), (apart,)))
    adapter = 4 * 39976960
    assert shared["frozen adapters"] == 2 * adapter
    assert own["frozen adapters"] == adapter, "the reference"
    assert own["the reward model's own base"] == 2 * 6738415616 + adapter


def test_a_pack_holds_a_prompt_once(check: Check) -> None:
    graph = check(SEVEN, "stages.rloo.train.pack_tokens=1", "stages.rloo.generation.batch_size=1")
    rloo, ppo = (graph.nodes[name].stage for name in ("rloo", "ppo"))
    assert largest_example(rloo, shared=True) == 256 - 128 + 4 * 128
    assert largest_example(rloo, shared=False) == 4 * 256
    assert largest_example(ppo, shared=True) == largest_example(ppo, shared=False) == 256
    tokens = rows_of(graph)["rloo"].memory["activations"] / (256 - 128 + 4 * 128)
    sft = rows_of(check(SEVEN, "stages.sft.train.pack_tokens=1"))["sft"].memory["activations"] / 1024
    assert tokens == pytest.approx(sft)


def test_policy_and_critic_take_half_the_tokens_each(check: Check) -> None:
    small = "stages.{}.generation.batch_size=1"
    budgets = [f"stages.{name}.train.pack_tokens=2048" for name in ("ppo", "rloo")]
    rows = rows_of(check(SEVEN, small.format("ppo"), small.format("rloo"), *budgets))
    assert rows["ppo"].memory["activations"] == rows["rloo"].memory["activations"]


def test_where_an_example_is_too_large_for_both_each_has_its_turn(check: Check) -> None:
    def activations(pack_tokens: int) -> int:
        overrides = ("stages.ppo.generation.batch_size=1", f"stages.ppo.train.pack_tokens={pack_tokens}")
        return rows_of(check(SEVEN, *overrides))["ppo"].memory["activations"]

    assert activations(512) == activations(511) * 512 // 511, "two roles on 256 tokens, one role on 511"
    assert activations(256) == activations(512) // 2
    assert activations(1) == activations(256), "an example is never cut"


# --- what a pack holds at its fullest ----------------------------------------------------------------------------


def step(size: ModelSize, tokens: int, **options: object) -> Parts:
    model = ModelSettings(base="b", quantization="nf4", adapter=LoraSettings(rank=8))
    return training_memory(size, model, LaunchSettings(), pack_tokens=tokens, compute_bytes=4, **options)


def test_tiles_and_backward_do_not_live_at_once() -> None:
    architecture = Architecture(hidden_size=64, intermediate_size=128, layers=2, heads=2)
    small, wide = (size_of_architecture(architecture, vocabulary) for vocabulary in (100, 100_000))
    assert step(wide, 512)["head"] == 3 * 4 * 2**22
    assert "backward" not in step(wide, 512)
    assert step(small, 512)["backward"] == 4 * 512 * 4 * (64 + 128)
    assert step(wide, 512, entropy="metric")["head"] == 5 * 4 * 2**22
    assert step(wide, 512, device="cuda")["head"] == 3 * 4 * 512 * 100_000, "a tile is larger than all there is"
    assert step(wide, 8192, device="cuda")["head"] == 3 * 4 * 2**26
    one, both = (step(wide, 512, entropy="metric", critic=True, at_once=each) for each in (False, True))
    assert both["activations"] == 2 * one["activations"]
    assert both["head"] + both["activations"] == one["head"] + one["activations"], "the critic's pass comes after it"
    assert "head" not in step(wide, 512, scores=True)


def test_drawing_is_the_larger_of_prompts_and_logits(seven: ModelSize) -> None:
    long, wide = GenerationSettings(max_new_tokens=512), GenerationSettings(max_new_tokens=1, top_p=0.9)
    assert generation_memory(seven, long, 2)["prompts"] == 8192 * 2 * 4 * (4096 + 11008), "in passes of so many tokens"
    assert generation_memory(seven, wide, 2)["logits"] == 8 * 4 * 64 * 32_000
    few = generation_memory(seven, long, 2, completions=2)
    assert few["keys and values"] == 2 * 2 * 512 * GIB // 2048
    assert few["prompts"] == 2 * 512 * 2 * 4 * (4096 + 11008)


def test_the_larger_phase_counts_with_what_stays() -> None:
    update = {"base": 10, "optimizer": 5, "gradients": 1, "activations": 7}
    assert at_its_peak(update, {"keys and values": 7}) == update
    assert at_its_peak(update, {"keys and values": 9}) == {"base": 10, "optimizer": 5, "keys and values": 9}
