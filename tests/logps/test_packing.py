"""A pack's layout changes memory and speed alone: padded rows, flat and shared packs agree in value and gradient."""

from __future__ import annotations

import pytest
import torch

from align.logps import last_rewards, pack_examples
from align.logps.engine import choose_packing
from align.models import RoleModel, load_base
from tests.logps.shapes import SHAPES, examples_of, gradient, scored
from tests.models.tiny import LORA, randomise


def trained(folder, quantization="none", checkpointing=False, lora=True) -> RoleModel:
    base = load_base(folder, quantization=quantization)
    for module in base.modules():  # GPT-2 has dropout of its own, which every training stage turns off
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    roles = RoleModel(base, gradient_checkpointing=checkpointing)
    if lora:
        roles.add_adapter("policy", settings=LORA, trainable=True, seed=1)
        randomise(roles, "policy", seed=2)
    else:
        roles.train_base()
    with torch.no_grad():
        assert choose_packing(roles.causal_lm, dropout=False, wanted="auto") == "shared"
    return roles.train()


@pytest.fixture(params=["llama-none", "llama-nf4", "qwen2-nf4-checkpointing", "llama-none-full", "gpt2-none"])
def model(request, folders) -> RoleModel:
    name, quantization, *rest = request.param.split("-")
    lora = "full" not in rest and name != "gpt2"
    return trained(folders[name], quantization, "checkpointing" in rest, lora)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packing", ["flat", "shared"])
def test_equals_padded_rows(model, packing, shape):
    examples = examples_of(SHAPES[shape])
    expected, expected_prompts = scored(model, "policy", examples, "rows", score_prompts=True)
    wanted = gradient(model, expected)
    for budget in (10_000, 12):
        found, prompts = scored(model, "policy", examples, packing, budget, score_prompts=True)
        torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(torch.stack(prompts), torch.stack(expected_prompts), rtol=1e-5, atol=2e-5)
        assert (gradient(model, found) - wanted).norm() <= 1e-4 * wanted.norm()


def test_rewards_do_not_depend_on_layout_or_neighbours(folders):
    roles = trained(folders["llama"])
    head = torch.nn.Linear(64, 1, bias=False)
    examples = [e for shape in SHAPES.values() for e in examples_of(shape) if e.prompt_ids]

    def rewards(packing, budget):
        found = {}
        for pack in pack_examples(examples, budget, packing=packing):
            values = roles("policy", last_rewards, pack, head).tolist()
            for i in pack.examples:
                k = len(examples[i].completions)
                found[i], values = values[:k], values[k:]
        return torch.tensor([value for i in sorted(found) for value in found[i]])

    alone = rewards("rows", 1)
    for packing in ("rows", "flat", "shared"):
        torch.testing.assert_close(rewards(packing, 10_000), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_transformers_own_logits_under_padding(folders, side):
    """The oracle: the model's own forward pass over a padded batch with an attention mask."""
    roles = trained(folders["qwen2"])
    examples = examples_of(SHAPES["unequal k"])
    rows = [(e.prompt_ids, c) for e in examples for c in e.completions]
    width = max(len(p) + len(c.ids) for p, c in rows)
    ids, mask = torch.full((len(rows), width), 1), torch.zeros(len(rows), width, dtype=torch.long)
    for r, (prompt, completion) in enumerate(rows):
        n = len(prompt) + len(completion.ids)
        place = slice(width - n, width) if side == "left" else slice(0, n)
        ids[r, place], mask[r, place] = torch.tensor(prompt + completion.ids), 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = roles("policy", lambda lm: lm(input_ids=ids, attention_mask=mask, position_ids=positions).logits)
        logps = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        expected = []
        for r, (prompt, completion) in enumerate(rows):
            first = (width - len(prompt) - len(completion.ids) if side == "left" else 0) + len(prompt) - 1
            own = logps[r, first : first + len(completion.ids)]
            expected.append(own[torch.tensor(completion.mask)].sum())
        found, _ = scored(roles, "policy", examples, "shared")
    torch.testing.assert_close(torch.cat(found), torch.stack(expected), rtol=1e-5, atol=2e-5)


def test_a_shared_prompt_is_computed_once():
    examples = examples_of([(50, (3, 4, 5))])
    tokens = {
        packing: sum(p.tokens for p in pack_examples(examples, 10_000, packing=packing))
        for packing in ("rows", "flat", "shared")
    }
    assert tokens == {"rows": 3 * 55, "flat": 150 + 12, "shared": 50 + 12}


@pytest.mark.parametrize("packing", ["rows", "flat", "shared"])
@pytest.mark.parametrize("budget", [1, 30, 100])
def test_packs_keep_to_the_budget_and_hold_every_example_once(packing, budget):
    examples = [e for shape in SHAPES.values() for e in examples_of(shape)]
    packs = pack_examples(examples, budget, packing=packing)
    assert sorted(i for p in packs for i in p.examples) == list(range(len(examples)))
    assert all(p.tokens <= budget or len(p.examples) == 1 for p in packs)
    assert all(p.completions == sum(len(examples[i].completions) for i in p.examples) for p in packs)
    again = pack_examples(examples, budget, packing=packing)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(packs, again, strict=True))


def test_masks_live_no_longer_than_their_pack():
    """They are quadratic in the length: only the pack that is computed has its own."""
    examples = examples_of([(200, (150, 149))] * 3)
    packs = pack_examples(examples, 600, packing="shared")
    assert len(packs) == 3
    held = sum(t.numel() for t in vars(packs[0].segments).values() if isinstance(t, torch.Tensor))
    blocks = [block for bundle in packs[0].segments.bundles for block in bundle.blocks]
    held += sum(t.numel() for block in blocks for t in vars(block).values() if isinstance(t, torch.Tensor))
    assert held < 10 * packs[0].tokens


def test_sums_over_long_completions_do_not_drift():
    examples = examples_of([(4, (4000, 3000))])
    (pack,) = pack_examples(examples, 10_000)
    values = -torch.rand(len(pack.targets), generator=torch.Generator().manual_seed(0)) * 9
    exact = [values[pack.owner == c].double().sum().item() for c in range(2)]
    assert pack.sum_by_completion(values).total.tolist() == pytest.approx(exact, rel=1e-7)
