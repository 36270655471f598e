"""The attention function behind flat packs: registered with transformers once, it serves every layer of every model.

Without segments it is transformers' own SDPA, so generation and padded rows are as they were. With segments it walks
them: a prompt is computed once for all its completions.

- ``blocks``: padded blocks through `scaled_dot_product_attention`. Runs everywhere; measured on CPU.
- ``ragged``: one call of `torch.nn.attention.varlen` with the keys of every segment gathered. For CUDA in half
  precision. Experimental: it has not been run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.logps.segments import Block, Segments

NAME = "align"


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
    if kernel_of(query.device.type, query.dtype) == "ragged":
        return _ragged(query[0], key[0], value[0], segments, scaling)[None], None
    groups = query.shape[1] // key.shape[1]
    return _blocks(query[0], repeat_kv(key, groups)[0], repeat_kv(value, groups)[0], segments, scaling)[None], None


def kernel_of(device: str, dtype: torch.dtype) -> str:
    """The kernel for a device and a dtype: `blocks` or `ragged`."""
    half = dtype in (torch.float16, torch.bfloat16)
    return "ragged" if device == "cuda" and half and _varlen() is not None else "blocks"


def _varlen() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    return varlen_attn


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
            elif before is not None and block.bias is not None:
                k, v = (torch.cat([_prefix(p, block), x], dim=2) for p, x in zip(before, (k, v), strict=True))
            bias = None if block.bias is None else block.bias.to(q.dtype)
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
    return _varlen()(
        q.contiguous(),
        k.index_select(0, segments.keys),
        v.index_select(0, segments.keys),
        segments.query_ends,
        segments.key_ends,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.shape[0] != key.shape[0],
    )


def register() -> None:
    """Make the function known to transformers under `NAME`; masks for calls without segments are SDPA's."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
