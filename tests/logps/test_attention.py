"""The attention function against one dense mask that spells out who sees whom."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from align.logps import attention, pack_examples, segments
from tests.logps.shapes import SHAPES, examples_of

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def dense_mask(pack) -> torch.Tensor:
    """[T, T] from the cumulative lengths and keys that ragged kernels get."""
    s = pack.segments
    seen = torch.zeros(pack.tokens, pack.tokens, dtype=torch.bool)
    for i in range(len(s.query_ends) - 1):
        start, end = int(s.query_ends[i]), int(s.query_ends[i + 1])
        keys = s.keys[s.key_ends[i] : s.key_ends[i + 1]]
        before = len(keys) - (end - start)
        for row in range(start, end):
            seen[row, keys[: before + row - start + 1]] = True
    return seen


def inputs(tokens: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, h, tokens, SIZE, generator=g).requires_grad_() for h in (HEADS, KEY_HEADS, KEY_HEADS)]


@pytest.mark.parametrize("block_tokens", [8, 4096])
@pytest.mark.parametrize("packing", ["flat", "shared"])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_equal_a_dense_mask(monkeypatch, shape, packing, block_tokens):
    monkeypatch.setattr(segments, "BLOCK_TOKENS", block_tokens)
    (pack,) = pack_examples(examples_of(SHAPES[shape]), 10_000, packing=packing)
    tensors = inputs(pack.tokens)
    own, _ = attention.attention(torch.nn.Module(), *tensors, None, scaling=0.3, segments=pack.segments)
    gradients = torch.autograd.grad(own.square().sum(), tensors)
    q, k, v = tensors
    repeat = HEADS // KEY_HEADS
    dense = F.scaled_dot_product_attention(
        q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), attn_mask=dense_mask(pack), scale=0.3
    ).transpose(1, 2)
    torch.testing.assert_close(own, dense)
    for a, b in zip(gradients, torch.autograd.grad(dense.square().sum(), tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("knows_groups", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_ragged_kernel_is_asked_for_the_same(monkeypatch, shape, knows_groups):
    """Its kernel runs on CUDA only; here a loop over segments stands in, so that its indices are checked.

    Before torch 2.13 the function has no argument for fewer key heads than query heads.
    """

    def old(q, k, v, query_ends, key_ends, longest_query, longest_key, *, scale, window_size):
        assert window_size == (-1, 0)
        out = []
        for i in range(len(query_ends) - 1):
            qs, ks = slice(query_ends[i], query_ends[i + 1]), slice(key_ends[i], key_ends[i + 1])
            rows, keys = q[qs].shape[0], k[ks].shape[0]
            assert rows <= longest_query
            assert keys <= longest_key
            mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
            repeat = HEADS // KEY_HEADS
            own_k, own_v = (x[ks].repeat_interleave(repeat, 1).transpose(0, 1) for x in (k, v))
            out.append(
                F.scaled_dot_product_attention(q[qs].transpose(0, 1), own_k, own_v, mask, scale=scale).transpose(0, 1)
            )
        return torch.cat(out)

    def new(*args, enable_gqa, **kwargs):
        assert enable_gqa
        return old(*args, **kwargs)

    varlen = new if knows_groups else old
    (pack,) = pack_examples(examples_of(SHAPES[shape]), 10_000, packing="shared")
    tensors = inputs(pack.tokens)
    blocks, _ = attention.attention(torch.nn.Module(), *tensors, None, scaling=0.3, segments=pack.segments)
    monkeypatch.setattr(attention, "_varlen", lambda: varlen)
    monkeypatch.setattr(attention, "kernel_of", lambda *_: "ragged")
    ragged, _ = attention.attention(torch.nn.Module(), *tensors, None, scaling=0.3, segments=pack.segments)
    torch.testing.assert_close(ragged, blocks)


def test_blocks_waste_little():
    """Ragged completions are padded inside attention to at most a quarter more than they are."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 200, (40, 2), generator=g).tolist()
    layout = segments.Layout([30] * 40, lengths)
    blocks = [b for bundle in layout.segments.bundles for b in bundle.completions]
    padded, real = sum(b.shape[0] * b.shape[1] for b in blocks), sum(b.size for b in blocks)
    assert real == sum(map(sum, lengths))
    assert padded <= segments.BLOCK_WASTE * real
    assert len(blocks) < 40
