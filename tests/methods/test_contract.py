"""What every registered method must keep, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from align.data.chat import Completion, Example
from align.logps import last_rewards, token_values
from align.methods import Method, all_methods, get_method
from align.recipe.ignored import declared
from align.training.buffer import Drawn, RolloutExample
from align.training.rollout_step import RolloutStep
from align.training.step import Step, Totals, scaled_loss
from align.types import Batch, LossOutput, Needs
from tests.methods.batches import (
    config_of,
    floating,
    means,
    part,
    policy_leaves,
    random_batch,
    random_unpaired,
    reference_leaves,
    tensors,
    wanted,
)
from tests.methods.rollouts import learnt, random_rollout

SUMS = "does the loss take a mean, or mix examples? return one value per example and its weight"


def total(outputs: list[LossOutput]) -> torch.Tensor:
    """The step's reduction: coefficient * sum of sums / sum of weights."""
    names = outputs[0].terms
    return sum(
        names[n].coefficient
        * sum(o.terms[n].sum.sum() for o in outputs)
        / sum(o.terms[n].weight.sum() for o in outputs)
        for n in names
    )


def test_the_loss_is_a_finite_fp32_scalar_with_gradient(method: Method):
    batch = floating(random_batch(method, 6), lambda t: t.float())
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
        assert parts.item() == pytest.approx(full.item(), rel=1e-12), SUMS


def test_gradients_of_micro_batches_equal_the_full_batch(method: Method):
    batch, config = random_batch(method, 8), config_of(method)
    leaves = policy_leaves(batch)
    total([method.loss(batch, config)]).backward()
    full = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    total([method.loss(part(batch, slice(i, i + 2)), config) for i in range(0, 8, 2)]).backward()
    for leaf, expected in zip(leaves, full, strict=True):
        torch.testing.assert_close(leaf.grad, expected, msg=lambda found: f"{SUMS}\n{found}")


def test_metrics_of_micro_batches_equal_the_full_batch(method: Method):
    batch, config = random_batch(method, 8), config_of(method)
    full, parts = Totals(), Totals()
    full.add(method.loss(batch, config).metrics)
    for i in range(8):
        parts.add(method.loss(part(batch, slice(i, i + 1)), config).metrics)
    assert full.numbers().keys() == parts.numbers().keys()
    for name, numbers in full.numbers().items():
        assert parts.numbers()[name] == pytest.approx(numbers, rel=1e-9), name


def test_order_of_examples_does_not_matter(method: Method):
    batch, config = random_batch(method, 7), config_of(method)
    shuffled = part(batch, torch.tensor([3, 1, 6, 0, 2, 5, 4]))
    assert method.loss(batch, config).loss.item() == pytest.approx(method.loss(shuffled, config).loss.item())


def test_weights_do_not_depend_on_logps(method: Method):
    """The step asks for the weights before any forward pass."""
    batch, config = random_batch(method, 5), config_of(method)
    before = method.loss(batch, config).terms
    for leaf in [*policy_leaves(batch), *reference_leaves(batch)]:
        leaf.data.zero_()
    if method.statistic is not None:
        batch = replace(batch, statistics={name: torch.zeros(()) for name in batch.statistics})
    after = method.loss(batch, config).terms
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name].weight, after[name].weight)


def test_likelier_good_completions_lower_the_loss(method: Method):
    """Gradient sign: up for what is wanted, down for what is not."""
    batch = random_batch(method, 12)
    policy_leaves(batch)
    method.loss(batch, config_of(method)).loss.backward()
    good, bad = wanted(batch)
    assert good.sum().item() < 0
    assert bad is None or bad.sum().item() > 0


def test_no_gradient_reaches_reference_statistics_or_metrics(method: Method):
    batch = random_batch(method, 4)
    policy_leaves(batch)
    frozen = reference_leaves(batch)
    if method.statistic is not None:
        frozen += [value.requires_grad_() for value in batch.statistics.values()]
    out = method.loss(batch, config_of(method))
    out.loss.backward()
    assert all(leaf.grad is None for leaf in frozen)
    assert all(not t.sum.requires_grad and not t.weight.requires_grad for t in out.metrics.values())


def test_the_reference_is_read_exactly_if_it_is_declared(method: Method):
    has_field, declared_read = "reference" in method.config.model_fields, method.reference
    assert has_field == declared_read
    if not method.reference:
        return
    batch, config = random_batch(method, 4), config_of(method)
    if method.batch is Batch.ROLLOUT:  # a KL in the reward is read by `advantages`, one in the loss by the loss
        rollout = random_rollout(2)
        elsewhere = replace(rollout, reference=rollout.reference - 0.5)
        batch, moved = (learnt(method, each, config) for each in (rollout, elsewhere))
    else:
        moved = replace(batch, reference=random_batch(method, 4, seed=5).reference)
    own, other = method.loss(batch, config).loss.item(), method.loss(moved, config).loss.item()
    assert own != pytest.approx(other), "the loss declares a reference and does not read it"


@pytest.mark.parametrize("kind", [kind for kind, method in all_methods().items() if method.statistic])
def test_the_statistic_is_read_and_is_that_of_the_whole_step(kind: str):
    """Parts added up give the whole; a row of weight 2 counts like the same row twice; there is no gradient."""
    method = get_method(kind)
    config, other = config_of(method), random_unpaired(6, 7)
    policy_leaves(other)
    whole, parts = Totals(), Totals()
    terms = method.statistic(other, config)
    whole.add(terms)
    for i in range(0, 6, 2):
        parts.add(method.statistic(part(other, slice(i, i + 2)), config))
    for name, numbers in whole.numbers().items():
        assert parts.numbers()[name] == pytest.approx(numbers, rel=1e-12)
        assert not terms[name].sum.requires_grad
    twice, weighted = part(other, torch.tensor([0, 0, 1])), part(other, torch.tensor([0, 1]))
    twice.weight[:], weighted.weight[:] = 1.0, torch.tensor([2.0, 1.0], dtype=torch.float64)
    expected = means(method.statistic(twice, config))
    for name, value in means(method.statistic(weighted, config)).items():
        assert value.item() == pytest.approx(expected[name].item())
        batch = random_batch(method, 4)
        moved = replace(batch, statistics=batch.statistics | {name: batch.statistics[name].abs() + 3})
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
    batch = floating(random_batch(method, 4), lambda t: t.to(torch.bfloat16).float())
    assert all(t.dtype in (torch.float32, torch.int64) for t in tensors(batch))
    out = method.loss(batch, config_of(method))
    terms = [*out.terms.values(), *out.metrics.values()]
    assert all(t.sum.dtype == torch.float32 and t.weight.dtype == torch.float32 for t in terms)


# --- settings -------------------------------------------------------------------------------------------------------

READ_ELSEWHERE = {
    "sft": {"loss_on"},  # where the mask of trained tokens is made; tests/data/test_chat.py shows it
    "pretrain": {"architecture", "tokenizer"},
    "reward": {"normalise", "normalise_prompts", "generation"},  # once the model is trained; tests/stages shows it
    "ppo": {"critic_start", "critic_learning_rate", "ptx", "ptx_weight"},  # where the critic and the text are trained
}
MIXED_IN = {"clip", "entropy_weight", "beta", "kl_estimator"}
"""Settings of `align.spec.online` that a loss, or what makes its advantages, reads."""


def own_settings(method: Method) -> set[str]:
    """What the method's class adds to its bases, so that its loss has to read it."""
    bases = [base for base in method.config.__mro__ if base.__module__.startswith("align.spec.")]
    shared = {name for base in bases for name in base.model_fields} | {"kind", "data", "completions"}
    return set(method.config.model_fields) - shared - READ_ELSEWHERE.get(method.kind, set())


def loss_under(method: Method, config: Any) -> float:
    """The loss of a batch; if it is of a rollout, with the advantages that these settings make of it."""
    return method.loss(random_batch(method, 6, config=config), config).loss.item()


def values_of(method: Method, name: str) -> Iterator[Any]:
    """Some values that the setting may have, its default aside."""
    field = method.config.model_fields[name]
    literal = get_origin(field.annotation) is Literal
    other: tuple[Any, ...] = (True, False) if field.annotation is bool else (0.0, 0.4, 3.0)
    for value in get_args(field.annotation) if literal else other:
        try:
            if config_of(method, **{name: value}) != config_of(method):
                yield value
        except ValueError:
            continue


def test_every_own_setting_is_read_unless_it_is_declared_unread(method: Method):
    """In the default settings and in those that differ from them by one: some value of a setting changes the loss."""
    names, unread = own_settings(method), declared(method.config)
    shared = MIXED_IN & method.config.model_fields.keys() if method.batch is Batch.ROLLOUT else set()
    for changed in [{}] + [{name: value} for name in sorted(names) for value in values_of(method, name)]:
        before = loss_under(method, config_of(method, **changed))
        for name in (names | shared) - set(changed):
            configs = [config_of(method, **changed, **{name: value}) for value in values_of(method, name)]
            read = any(loss_under(method, c) != pytest.approx(before, rel=1e-9) for c in configs)
            said = [any(each.field == name and each.when(c) for each in unread) for c in configs]
            assert read != all(said), f"{method.kind} with {changed}: {name} is {'read' if read else 'not read'}"


# --- through packs ---------------------------------------------------------------------------------------------------


class Table:
    """A model whose log-probability of a token depends on it and on the token before it."""

    def __init__(self, vocabulary: int) -> None:
        self.values = torch.rand(vocabulary, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def __call__(self, role: str, function: Any, pack: Any, beside: Any = ()) -> Any:
        if beside:
            return tuple(self(name, each, pack) for name, each in ((role, function), *beside))
        ids = pack.input_ids.flatten()
        if function is last_rewards:
            return self.values[ids[pack.last]] * 3
        if function is token_values:
            return self.values[ids[pack.positions]] - 0.3
        logps = -self.values[pack.targets] * (1 + self.values[ids[pack.positions]])
        return (logps, self.values[ids[pack.positions]] * 2) if isinstance(function, partial) else logps


def examples_of(method: Method, n: int, vocabulary: int) -> list[Example]:
    g = torch.Generator().manual_seed(1)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=g))  # noqa: E731
    ids = lambda k: torch.randint(1, vocabulary, (k,), generator=g).tolist()  # noqa: E731
    completion = lambda k: Completion(ids(k), [True] * k, False)  # noqa: E731
    out = []
    for row in range(n):
        scores: tuple[float, ...] = (1.0, 0.0)
        count = {Batch.TOKENS: 1}.get(method.batch, 2)
        if method.batch is Batch.UNPAIRED:
            scores = (float(row % 2),)
        elif method.batch is Batch.RANKED:
            scores = (2.0, *(float(draw(0, 2)) for _ in range(draw(1, 4))))
            count = len(scores) + (Needs.REWARDS not in method.needs)
        elif method.batch is Batch.ROLLOUT:
            count = draw(1, 4)
        completions = tuple(completion(draw(1, 12)) for _ in range(count))
        weight, margin = draw(1, 4) / 2, draw(0, 3) / 2
        example = Example(row, ids(draw(2, 9)), completions, weight, b"", scores, margin)
        out.append(drawn(example, g) if method.batch is Batch.ROLLOUT else example)
    return out


def drawn(example: Example, g: torch.Generator) -> RolloutExample:
    """The example with what a rollout found out about its tokens; every third completion is left out."""
    tokens = sum(len(c.ids) for c in example.completions)
    numbers = {name: torch.randn(tokens, generator=g) for name in ("advantages", "values", "returns")}
    logps = {name: -torch.rand(tokens, generator=g) for name in ("old", "reference")}
    kept = tuple((example.row + k) % 3 != 1 for k in range(len(example.completions)))
    return RolloutExample(
        example.row, example.prompt_ids, example.completions, 1.0, drawn=Drawn(kept=kept, **numbers, **logps)
    )


def one_step(method: Method, examples: list[Example], pack_tokens: int, config: Any) -> tuple[float, torch.Tensor, int]:
    """Loss, gradient and number of packs of an optimizer step, as the trainer makes them."""
    model = Table(40)
    step = (RolloutStep if method.batch is Batch.ROLLOUT else Step)(method, config, pack_tokens)
    references = None
    if method.reference:
        references = [[-0.9 * len(c.ids) for c in e.completions] for e in examples]
    packs, statistic = step.packs(examples), Totals()
    for pack in step.mismatched(examples):
        statistic.add(step.statistics(model, pack, examples, references))
    statistics = {name: torch.tensor(value / weight) for name, (value, weight) in statistic.numbers().items()}
    weights, loss = step.weights(examples, packs), 0.0
    for pack in packs:
        share = scaled_loss(step.terms(model, pack, examples, references, statistics), weights)
        share.backward()
        loss += share.item()
    return loss, model.values.grad, len(packs)


def test_packs_and_their_padding_do_not_matter(method: Method):
    """One pack of everything, padded to the longest row, or one per example."""
    configs = [config_of(method)]
    if method.batch is Batch.ROLLOUT:
        configs.append(config_of(method, entropy_weight=0.3))
    if Needs.PROMPT_LOGPS in method.needs:
        configs.append(config_of(method, loss_on="all"))
    for config in configs:
        examples = examples_of(method, 7, 40)
        loss, gradient, packs = one_step(method, examples, 100_000, config)
        cut_loss, cut_gradient, cut_packs = one_step(method, examples, 1, config)
        assert (packs, cut_packs) == (1, 7 * (1 + (Needs.VALUES in method.needs))), (
            "one role at a time where it is tight"
        )
        assert cut_loss == pytest.approx(loss, rel=1e-5), SUMS
        told = lambda found: f"{SUMS}\n{found}"  # noqa: E731
        torch.testing.assert_close(cut_gradient, gradient, rtol=1e-4, atol=1e-6, msg=told)
