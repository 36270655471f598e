"""Attention over a prompt that is kept once and over rows beside it, against attention over whole sequences."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from align.rollout.kv import KV, Prompts, attention

HEADS, KEY_HEADS, SIZE = 4, 2, 8
CPU = torch.device("cpu")
LAYER = SimpleNamespace(layer_idx=0, num_key_value_groups=HEADS // KEY_HEADS, is_causal=True)


def states(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, SIZE, generator=torch.Generator().manual_seed(seed))


def whole(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[heads, D] attention of the last token: query [heads, D], keys and values [key heads, T, D]."""
    groups = HEADS // KEY_HEADS
    keys, values = (x.repeat_interleave(groups, 0) for x in (keys, values))
    return F.scaled_dot_product_attention(query[:, None], keys, values)[:, 0]


@pytest.mark.parametrize("lengths", [[5, 3], [1, 7], [0, 4], [0, 0]], ids=str)
def test_rows_of_shared_prompts_see_what_whole_sequences_have(lengths: list[int]) -> None:
    of_row, steps = [1, 0, 1], 3
    kv = KV(rows=3, row_tokens=4, slots=3, slot_tokens=9, device=CPU)
    prompt = [tuple(states(KEY_HEADS, n, seed=10 + 2 * i + j) for j in range(2)) for i, n in enumerate(lengths)]
    longer = [i for i, n in enumerate(lengths) if n]
    if longer:
        width = max(lengths)
        padded = [torch.stack([F.pad(prompt[i][j], (0, 0, 0, width - lengths[i]), value=9.0) for i in longer])
                  for j in range(2)]  # fmt: skip
        kv.prefill(torch.tensor(longer))
        kv.update(*padded, 0)
    members, place = torch.tensor([[1, 0], [0, 2]]), torch.tensor([2, 0, 3])
    prompts = Prompts(torch.tensor(lengths), max(lengths), members, place)
    own = [[torch.zeros(KEY_HEADS, 0, SIZE)] * 2 for _ in of_row]
    for step in range(steps):
        new = [states(3, KEY_HEADS, 1, seed=100 + 2 * step + j) for j in range(2)]
        query = states(3, HEADS, 1, seed=200 + step)
        kv.decode(torch.full((3,), step), step + 1, prompts)
        kv.update(*new, 0)
        found, _ = attention(LAYER, query, *new, None, rollout=kv)
        assert found.shape == (3, 1, HEADS, SIZE)
        for row, i in enumerate(of_row):
            own[row] = [torch.cat([own[row][j], new[j][row]], 1) for j in range(2)]
            keys, values = (torch.cat([prompt[i][j], own[row][j]], 1) for j in range(2))
            assert torch.allclose(found[row, 0], whole(query[row, :, 0], keys, values), atol=1e-6)


def test_rows_that_began_at_different_steps() -> None:
    """Without slots a row holds its prompt; what an earlier completion left behind it is not seen."""
    kv = KV(rows=2, row_tokens=6, slots=0, slot_tokens=0, device=CPU)
    kv.prefill(torch.tensor([0, 1]))
    kv.update(*(states(2, KEY_HEADS, 5, seed=j) * 100 for j in range(2)), 0)
    kv.prefill(torch.tensor([1]))
    first = [states(1, KEY_HEADS, 2, seed=10 + j) for j in range(2)]
    kv.update(*first, 0)
    new, query = [states(2, KEY_HEADS, 1, seed=20 + j) for j in range(2)], states(2, HEADS, 1, seed=30)
    kv.decode(torch.tensor([5, 2]), 6)
    kv.update(*new, 0)
    found, _ = attention(LAYER, query, *new, None, rollout=kv)
    keys, values = (torch.cat([first[j][0], new[j][1]], 1) for j in range(2))
    assert torch.allclose(found[1, 0], whole(query[1, :, 0], keys, values), atol=1e-6)
    assert not torch.allclose(found[0], found[1])


def test_rows_are_taken_and_reordered() -> None:
    kv = KV(rows=3, row_tokens=2, slots=2, slot_tokens=2, device=CPU)
    kv.prefill(torch.tensor([0, 1]))
    kv.update(*(states(2, KEY_HEADS, 2, seed=j) for j in range(2)), 0)
    members, place = torch.tensor([[0, 1], [2, 2]]), torch.tensor([0, 1, 2])
    kv.decode(torch.zeros(3, dtype=torch.long), 1, Prompts(torch.tensor([2, 2]), 2, members, place))
    kv.update(*(states(3, KEY_HEADS, 1, seed=5 + j) for j in range(2)), 0)
    before = {part: [x.clone() for x in getattr(kv, part)[0]] for part in ("own", "prompt")}
    kv.reorder(torch.tensor([1, 1, 0]), 1)
    assert all(torch.equal(x, y[[1, 1, 0]]) for x, y in zip(kv.own[0], before["own"], strict=True))
    kv.take(torch.tensor([2, 0]), torch.tensor([1]))
    assert all(torch.equal(x, y[[0, 1]]) for x, y in zip(kv.own[0], before["own"], strict=True))
    assert all(torch.equal(x, y[[1]]) for x, y in zip(kv.prompt[0], before["prompt"], strict=True))


def test_a_pass_for_nothing_keeps_nothing() -> None:
    kv = KV(rows=1, row_tokens=2, slots=0, slot_tokens=0, device=CPU)
    new = [states(1, KEY_HEADS, 1, seed=j) for j in range(2)]
    kv.nothing()
    assert kv.update(*new, 0) == tuple(new)
    assert not kv.own
    found, _ = attention(LAYER, states(1, HEADS, 1, seed=3), *new, None, rollout=kv)
    assert torch.allclose(found[0, 0], new[1][0, :, 0].repeat_interleave(2, 0))


def test_what_it_does_not_know_is_refused() -> None:
    kv, x = KV(rows=1, row_tokens=2, slots=0, slot_tokens=0, device=CPU), states(1, HEADS, 1, seed=0)
    with pytest.raises(ValueError, match="softcap"):
        attention(LAYER, x, x, x, None, rollout=kv, softcap=30.0)
    with pytest.raises(ValueError, match="not told of the cache"):
        attention(LAYER, x, x, x, None)
