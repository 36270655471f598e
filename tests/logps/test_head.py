"""The head in tiles, with its gradient in the forward pass, against autograd through all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from align.logps import head


def plain(lm_head, states, targets):
    return lm_head(states).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def through(lm_head, states, targets, reading=None):
    """The log-probabilities alone."""
    return head._through_head(lm_head, states, targets, lm_head.out_features, reading or head._Reading())[0]


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
    own, expected = through(lm_head, states, targets), plain(lm_head, states, targets)
    torch.testing.assert_close(own, expected)
    found = torch.autograd.grad((own * scale).sum(), wanted)
    for a, b in zip(found, torch.autograd.grad((expected * scale).sum(), wanted), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(through(lm_head, states, targets), expected)


def test_bf16_is_summed_in_fp32():
    """Values stay as near to the fp32 result as rounding the inputs to bf16 allows."""
    torch.manual_seed(0)
    lm_head = nn.Linear(32, 500, bias=False).requires_grad_(False)
    states, targets = torch.randn(200, 32), torch.randint(0, 500, (200,))
    exact = plain(lm_head, states, targets)
    rounded = states.bfloat16().requires_grad_()
    own = through(lm_head.bfloat16(), rounded, targets)
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
    through(lm_head, rounded, targets).sum().backward()
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
        through(lm_head, states, targets)
    assert sum(kept) == 40 * 8


@pytest.mark.parametrize("entropy", ["metric", "bonus"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("tile_elements", [64 * 7, 2**22])
def test_temperature_and_entropy(monkeypatch, tile_elements, frozen, entropy):
    """Both are those of logits divided by the temperature, with the gradient that autograd gives; a metric has none."""
    monkeypatch.setattr(head, "TILE_ELEMENTS", tile_elements)
    torch.manual_seed(0)
    lm_head = nn.Linear(16, 64).requires_grad_(not frozen)
    states, targets = torch.randn(30, 16, requires_grad=True), torch.randint(0, 64, (30,))
    a, b = torch.randn(30), torch.randn(30) * (entropy == "bonus")
    wanted = [states, *(p for p in lm_head.parameters() if p.requires_grad)]
    own = head._through_head(lm_head, states, targets, 64, head._Reading(0.7, entropy))
    log_p = (lm_head(states) / 0.7).log_softmax(-1)
    expected = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(own, expected)
    assert own[1].requires_grad == (entropy == "bonus")
    found = torch.autograd.grad((own[0] * a).sum() + (own[1] * b).sum(), wanted)
    for x, y in zip(found, torch.autograd.grad((expected[0] * a).sum() + (expected[1] * b).sum(), wanted), strict=True):
        torch.testing.assert_close(x, y)
    with torch.no_grad():
        torch.testing.assert_close(
            head._through_head(lm_head, states, targets, 64, head._Reading(0.7, entropy)), expected
        )
