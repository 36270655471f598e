"""The attention function behind flat packs: registered with transformers once, it serves every layer of every model.

Without segments it is transformers' own SDPA, so generation and padded rows are as they were. With segments it walks
them: a prompt is computed once for all its completions.

- ``blocks``: padded blocks through `scaled_dot_product_attention`. Runs everywhere; measured on CPU.
- ``ragged``: one call of `torch.nn.attention.varlen` with the keys of every segment gathered. For CUDA in half
  precision. Experimental: it has not been run on a GPU.
"""

from __future__ import annotations

import inspect
import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.logps.precision import computed_in
from align.logps.segments import Block, Layout, Segments
from align.recipe.packing import Attention, kernel_for

logger = logging.getLogger(__name__)

NAME = "align"

UNKNOWN = ("softcap", "s_aux", "position_bias", "sliding_window")
"""What some models hand to their attention function that segments do not know."""


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; the signature is transformers'.

    Args:
        module: The attention layer.
        query: [1, heads, T, head size].
        key: [1, key heads, T, head size].
        value: The same.
        attention_mask: Not read with segments.
        scaling: Factor of the scores.
        dropout: Not possible with segments.
        segments: How the pack is made up.
        **kwargs: What other attention functions read.

    Returns:
        [1, T, heads, head size], and no attention weights.
    """
    if segments is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    unknown = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"attention with {', '.join(unknown)} cannot be computed over segments")
    dtype = computed_in(query.device, query.dtype)  # rotary positions leave queries and keys in fp32 under autocast
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if kernel_of(query.device.type, dtype) == "ragged":
        return _ragged(query[0], key[0], value[0], segments, scaling)[None], None
    groups = query.shape[1] // key.shape[1]
    return _blocks(query[0], repeat_kv(key, groups)[0], repeat_kv(value, groups)[0], segments, scaling)[None], None


def kernel_of(device: str, dtype: torch.dtype) -> Attention:
    """The kernel for a device and a dtype: `blocks` or `ragged`."""
    kernel = kernel_for(device, half=dtype in (torch.float16, torch.bfloat16))
    return "blocks" if kernel == "ragged" and not ragged_works(dtype) else kernel


def _varlen() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@cache
def ragged_works(dtype: torch.dtype) -> bool:
    """Whether the ragged kernel gives on this GPU what blocks give, forward and backward, with fewer key heads too."""
    if _varlen() is None or not torch.cuda.is_available():
        return False
    segments = Layout([5, 3], [[4, 2], [6, 1]]).segments.to(torch.device("cuda"))
    tokens = int(segments.query_ends[-1])
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(h, tokens, 64, device="cuda", generator=draw).to(dtype).requires_grad_() for h in (4, 2, 2))
    try:
        with torch.enable_grad():
            own = _ragged(q, k, v, segments, None)
            wide_k, wide_v = (repeat_kv(x[None], 2)[0] for x in (k, v))
            expected = _blocks(q, wide_k, wide_v, segments, None)
            gradients = [torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in (own, expected)]
    except (RuntimeError, TypeError, NotImplementedError) as error:
        logger.warning("the ragged attention kernel does not run here (%s); padded blocks take its place", error)
        return False
    pairs = [(own, expected), *zip(*gradients, strict=True)]
    agree = all((a.float() - b.float()).norm() <= 0.03 * b.float().norm() for a, b in pairs)
    if not agree:
        logger.warning("the ragged attention kernel gives other numbers here; padded blocks take its place")
    return agree


def _blocks(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """[T, heads, head size]. The inputs are cut once, so that their gradients are put together once."""
    sizes = segments.sizes
    pieces = zip(query.split(sizes, 1), key.split(sizes, 1), value.split(sizes, 1), strict=True)
    outputs = []
    for bundle in segments.bundles:
        before: tuple[Tensor, Tensor] | None = None
        for block in bundle.blocks:
            q, k, v = (_padded(x, block) for x in next(pieces))
            if block is bundle.prompts:
                before = (k, v)
            elif before is not None and block.before is not None:
                k, v = (torch.cat([_prefix(p, block), x], dim=2) for p, x in zip(before, (k, v), strict=True))
            bias = segments.bias(block, q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=scaling)
            out = out.transpose(1, 2).flatten(0, 1)
            outputs.append(out if block.real is None else out.index_select(0, block.real))
    return torch.cat(outputs)


def _padded(x: Tensor, block: Block) -> Tensor:
    """[heads, m, head size] as [n, heads, Q, head size]."""
    if block.padding is not None:
        x = x.index_select(1, block.padding)
    return x.unflatten(1, block.shape).transpose(0, 1)


def _prefix(prompts: Tensor, block: Block) -> Tensor:
    """The keys or values of the prompts, [prompts, heads, P, head size], one for each completion of a block."""
    n = block.shape[0]
    return prompts.expand(n, -1, -1, -1) if block.prompt is None else prompts.index_select(0, block.prompt)


def _ragged(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """[T, heads, head size], in one call over all segments; causal from the last token on, as lengths differ."""
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    longest_query, longest_key = segments.longest
    varlen = _varlen()
    # Before torch 2.13 the function has no such argument and takes fewer key heads as they come.
    knows = "enable_gqa" in inspect.signature(varlen).parameters
    grouped = {"enable_gqa": query.shape[0] != key.shape[0]} if knows else {}
    return varlen(
        q.contiguous(),
        k.index_select(0, segments.keys),
        v.index_select(0, segments.keys),
        segments.query_ends,
        segments.key_ends,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1, 0),
        **grouped,
    )


def register() -> None:
    """Make the function known to transformers under `NAME`; masks for calls without segments are SDPA's."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
