"""The head in tiles, with its gradient in the forward pass, against autograd through all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from align.logps import head


def plain(lm_head, states, targets):
    return lm_head(states).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("tile_elements", [1, 64 * 7, 2**22])
def test_values_and_gradients(monkeypatch, tile_elements, frozen, bias):
    monkeypatch.setattr(head, "TILE_ELEMENTS", tile_elements)
    torch.manual_seed(0)
    lm_head = nn.Linear(16, 64, bias=bias).requires_grad_(not frozen)
    states, targets = torch.randn(30, 16, requires_grad=True), torch.randint(0, 64, (30,))
    scale = torch.randn(30)
    wanted = [states, *(p for p in lm_head.parameters() if p.requires_grad)]
    own, expected = head._through_head(lm_head, states, targets, 64), plain(lm_head, states, targets)
    torch.testing.assert_close(own, expected)
    found = torch.autograd.grad((own * scale).sum(), wanted)
    for a, b in zip(found, torch.autograd.grad((expected * scale).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(head._through_head(lm_head, states, targets, 64), expected)


def test_bf16_is_summed_in_fp32():
    """Values stay as near to the fp32 result as rounding the inputs to bf16 allows."""
    torch.manual_seed(0)
    lm_head = nn.Linear(32, 500, bias=False).requires_grad_(False)
    states, targets = torch.randn(200, 32), torch.randint(0, 500, (200,))
    exact = plain(lm_head, states, targets)
    rounded = states.bfloat16().requires_grad_()
    own = head._through_head(lm_head.bfloat16(), rounded, targets, 500)
    own.sum().backward()
    assert own.dtype == torch.float32
    assert rounded.grad.dtype == torch.bfloat16
    assert (own - exact).abs().max() < 0.05


@pytest.mark.parametrize("nearness", [3.0, 8.0, 12.0])
def test_gradients_of_likely_tokens_survive_bf16(nearness):
    """The likelier a token, the smaller its gradient: it must not drown in the rounding of the head's rows."""
    torch.manual_seed(0)
    weight = torch.randn(512, 64)
    targets = torch.randint(0, 512, (100,))
    states = weight[targets] / weight[targets].norm(dim=-1, keepdim=True) ** 2 * nearness
    lm_head = nn.Linear(64, 512, bias=False).requires_grad_(False)
    lm_head.weight.data = weight.bfloat16()
    rounded = states.bfloat16().requires_grad_()
    head._through_head(lm_head, rounded, targets, 512).sum().backward()
    exact = rounded.detach().double().requires_grad_()
    plain_double = (exact @ weight.bfloat16().double().T).log_softmax(-1).gather(1, targets[:, None])
    plain_double.sum().backward()
    error = (rounded.grad.double() - exact.grad).norm(dim=-1) / exact.grad.norm(dim=-1)
    assert error.median() < 0.05


def test_a_frozen_head_keeps_no_logits():
    """What autograd keeps for the backward pass is [N, H], whatever the vocabulary."""
    lm_head = nn.Linear(8, 5000, bias=False).requires_grad_(False)
    states, targets = torch.randn(40, 8, requires_grad=True), torch.randint(0, 5000, (40,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        head._through_head(lm_head, states, targets, 5000)
    assert sum(kept) == 40 * 8
