"""What every registered method must keep, whoever wrote it."""

from __future__ import annotations

import pytest
import torch

from align.methods import Method
from align.types import Batch, LossOutput, PairedLogps, map_logps
from tests.methods.batches import config_of, random_batch


def part(batch, rows):
    return map_logps(batch, lambda t: t[rows])


def total(outputs: list[LossOutput]) -> torch.Tensor:
    """The step's reduction: coefficient * sum of sums / sum of weights."""
    names = outputs[0].terms
    return sum(
        names[n].coefficient
        * sum(o.terms[n].sum.sum() for o in outputs)
        / sum(o.terms[n].weight.sum() for o in outputs)
        for n in names
    )


def policy_leaves(batch):
    """The tensors of the policy's log-probabilities, made leaves."""
    logps = [batch.policy] if not isinstance(batch, PairedLogps) else [batch.chosen, batch.rejected]
    return [leaf.total.requires_grad_() for leaf in logps]


def test_the_loss_is_a_finite_fp32_scalar_with_gradient(method: Method):
    batch = map_logps(random_batch(method, 6), lambda t: t.float())
    leaves = policy_leaves(batch)
    loss = method.loss(batch, config_of(method)).loss
    loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0 for leaf in leaves)


def test_micro_batches_equal_the_full_batch(method: Method):
    batch, config = random_batch(method, 8), config_of(method)
    full = total([method.loss(batch, config)])
    for cut in ([slice(0, 3), slice(3, 8)], [slice(i, i + 1) for i in range(8)]):
        parts = total([method.loss(part(batch, rows), config) for rows in cut])
        assert parts.item() == pytest.approx(full.item(), rel=1e-12)


def test_gradients_of_micro_batches_equal_the_full_batch(method: Method):
    batch, config = random_batch(method, 8), config_of(method)
    leaves = policy_leaves(batch)
    total([method.loss(batch, config)]).backward()
    full = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    total([method.loss(part(batch, slice(i, i + 2)), config) for i in range(0, 8, 2)]).backward()
    for leaf, expected in zip(leaves, full, strict=True):
        torch.testing.assert_close(leaf.grad, expected)


def test_order_of_examples_does_not_matter(method: Method):
    batch, config = random_batch(method, 7), config_of(method)
    shuffled = part(batch, torch.tensor([3, 1, 6, 0, 2, 5, 4]))
    assert method.loss(batch, config).loss.item() == pytest.approx(method.loss(shuffled, config).loss.item())


def test_weights_do_not_depend_on_logps(method: Method):
    """The step asks for the weights before any forward pass."""
    batch, config = random_batch(method, 5), config_of(method)
    lengths_kept = map_logps(batch, torch.clone)
    for leaf in policy_leaves(lengths_kept):
        leaf.data.zero_()
    before, after = method.loss(batch, config).terms, method.loss(lengths_kept, config).terms
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name].weight, after[name].weight)


def test_likelier_good_completions_lower_the_loss(method: Method):
    """Gradient sign: up for what is wanted, down for what is not."""
    batch = random_batch(method, 6)
    leaves = policy_leaves(batch)
    method.loss(batch, config_of(method)).loss.backward()
    assert (leaves[0].grad.sum() < 0).item()
    if method.batch is Batch.PAIRED:
        assert (leaves[1].grad.sum() > 0).item()


def test_no_gradient_reaches_the_reference(method: Method):
    if not method.reference:
        pytest.skip(f"{method.kind} has no reference")
    batch = random_batch(method, 4)
    policy_leaves(batch)
    reference = [batch.reference.chosen.total.detach(), batch.reference.rejected.total.detach()]
    out = method.loss(batch, config_of(method))
    out.loss.backward()
    assert all(r.grad is None for r in reference)
    assert all(not m.sum.requires_grad for m in out.metrics.values())


def test_the_reference_is_read_exactly_if_it_is_declared(method: Method):
    if method.batch is not Batch.PAIRED:
        pytest.skip("only pairs carry a reference")
    batch, config = random_batch(method, 4), config_of(method)
    if not method.reference:
        assert "reference" not in method.config.model_fields
        return
    assert "reference" in method.config.model_fields
    moved = PairedLogps(batch.chosen, batch.rejected, batch.weight, random_batch(method, 4, seed=5).reference)
    assert method.loss(batch, config).loss.item() != pytest.approx(method.loss(moved, config).loss.item())


def test_row_weights_scale_rows(method: Method):
    """A row of weight 2 counts like the same row twice; of weight 0, not at all."""
    batch, config = random_batch(method, 3), config_of(method)
    twice = part(batch, torch.tensor([0, 0, 1]))
    twice.weight[:] = 1.0
    weighted = part(batch, torch.tensor([0, 1, 2]))
    weighted.weight[:] = torch.tensor([2.0, 1.0, 0.0], dtype=weighted.weight.dtype)
    assert method.loss(weighted, config).loss.item() == pytest.approx(method.loss(twice, config).loss.item())


def test_bf16_in_fp32_out(method: Method):
    """The engine hands over fp32 sums whatever the model's dtype, so terms and metrics are fp32."""
    batch = map_logps(random_batch(method, 4), lambda t: t.to(torch.bfloat16).float())
    out = method.loss(batch, config_of(method))
    terms = [*out.terms.values(), *out.metrics.values()]
    assert all(t.sum.dtype == torch.float32 and t.weight.dtype == torch.float32 for t in terms)


def test_every_own_setting_is_read(method: Method):
    """A setting that the loss does not read is an error: some value of it changes the loss."""
    shared = set(method.config.__mro__[1].model_fields) | {"kind", "reference", "architecture", "tokenizer", "data"}
    batch = random_batch(method, 5)
    base = method.loss(batch, config_of(method)).loss.item()
    # `loss_on` is read where the completion mask is made; tests/data/test_chat.py shows it.
    for name in set(method.config.model_fields) - shared - {"loss_on"}:
        others = []
        for value in (0.25, 0.4, 3.0, "sequence_mean", "sum", "token_mean", True):
            try:
                config = config_of(method, **{name: value})
            except ValueError:
                continue
            others.append(method.loss(batch, config).loss.item())
        assert any(o != pytest.approx(base) for o in others), f"{method.kind} does not read {name}"
