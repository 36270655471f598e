"""The operations of a step, written out by hand where the numbers are small, and as the documents quote them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.arithmetic import Layout, Sizes, effective_tokens, forward_flops, layout, step_flops

SMALL = Sizes(hidden=256, intermediate=768, layers=4, queries=256, keys=256, vocabulary=8192, rank=8)


def test_parameters_of_a_layer() -> None:
    sizes = Sizes(hidden=4, intermediate=6, layers=2, queries=4, keys=2, vocabulary=10, rank=3)
    assert sizes.body == 2 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6)
    assert sizes.adapter == 2 * 3 * ((4 + 4) + 2 * (4 + 2) + (4 + 4) + 3 * (4 + 6))


def test_layouts() -> None:
    pair = [(4, (2, 3))]
    assert layout([pair], "shared") == Layout(tokens=9, pairs=10 + (8 + 3) + (12 + 6), scored=5, heads=2)
    assert layout([pair], "flat") == Layout(tokens=13, pairs=21 + 28, scored=5, heads=2)
    assert layout([pair], "rows") == Layout(tokens=14, pairs=28 + 28, scored=5, heads=2)
    assert layout([pair], "rows", everywhere=True).scored == 14
    assert layout([pair, [(1, (1,))]], "rows").tokens == 14 + 2  # every group has a width of its own
    assert effective_tokens(pair) == 13


@pytest.mark.parametrize(("k", "ratio", "bound"), [(2, 1, 1.33), (2, 4, 1.67), (4, 2, 2.0), (8, 1, 1.78), (8, 4, 3.33)])
def test_the_body_ratio_of_a_shared_prompt(k: int, ratio: int, bound: float) -> None:
    group = [[(128 * ratio, (128,) * k)]]
    flat, shared = (step_flops(SMALL, layout(group, way)) for way in ("flat", "shared"))
    assert flat.body / shared.body == pytest.approx(bound, abs=0.005)
    assert flat.head == shared.head
    assert flat.total / shared.total < bound


def test_what_switches_add() -> None:
    laid = layout([[(512, (128, 128))]], "rows")
    plain, once = step_flops(SMALL, laid, input_gradients=True), forward_flops(SMALL, laid)
    checkpointed = step_flops(SMALL, laid, checkpointing=True, input_gradients=True)
    assert checkpointed.body == pytest.approx(1.5 * plain.body)
    assert checkpointed.head == plain.head
    live = step_flops(SMALL, laid, live_reference=True, input_gradients=True)
    assert live.total - plain.total == pytest.approx(once.total - once.adapter)
    heads = [step_flops(SMALL, laid, head=h).head / plain.head for h in ("once", "recomputed", "trained")]
    assert heads == [1.0, 1.5, 2.0]
    assert plain.body - step_flops(SMALL, laid).body == pytest.approx(2 * laid.tokens * 3 * 256 * 256)
    assert step_flops(SMALL, laid, head="none").head == pytest.approx(3 * 2 * 256 * 2)


def test_a_forward_pass_is_what_torch_counts() -> None:
    """With attention that computes a full square, which torch's counter sees."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = Sizes(hidden=32, intermediate=48, layers=2, queries=32, keys=16, vocabulary=64, rank=1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model, T = LlamaForCausalLM(config), 24
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(T)[None], use_cache=False)
    found = forward_flops(sizes, Layout(tokens=T, pairs=T * T, scored=T), adapter=False)
    assert counter.get_total_flops() == pytest.approx(found.total, rel=1e-3)
