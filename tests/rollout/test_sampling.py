from __future__ import annotations

import pytest
import torch

from align.rollout.sampling import Sampler, invert
from tests.rollout.plain import settings


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 5, 63, 64, 65, 320, 1000])
def test_the_place_is_that_in_a_table_of_cumulated_weights(n: int) -> None:
    weights, draws = scores(200, n).exp(), uniform(200)
    cumulated = weights.double().cumsum(-1)
    expected = torch.searchsorted(cumulated, draws[:, None] * cumulated[:, -1:], right=True)[:, 0].clamp(max=n - 1)
    places, total = invert(weights, draws)
    assert torch.equal(places, expected)
    assert torch.allclose(total, cumulated[:, -1])


def test_nothing_without_weight_is_found() -> None:
    weights = torch.zeros(4, 200)
    weights[:, 70], weights[:, 130] = 1.0, 2.0
    almost_one = 1 - 2.0**-53
    places, _ = invert(weights, torch.tensor([0.0, 1 / 3 - 1e-9, 1 / 3 + 1e-9, almost_one], dtype=torch.float64))
    assert places.tolist() == [70, 70, 130, 130]


def test_weights_that_are_no_numbers_name_some_token() -> None:
    places, _ = invert(torch.full((1, 70), torch.nan), torch.tensor([0.5], dtype=torch.float64))
    assert 0 <= int(places) < 70


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8}], ids=str)
def test_log_probabilities_are_those_before_anything_is_cut(temperature: float, cut: dict) -> None:
    logits = scores(50, 300)
    tokens, logps = Sampler(settings(temperature=temperature, **cut))(logits, uniform(50))
    expected = (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert torch.allclose(logps, expected, atol=1e-5)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, -1.0, 0.0]])
    tokens, logps = Sampler(settings(temperature=0.0))(logits, None)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert torch.allclose(logps, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 2}, {2, 0}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.3}, {2}),
        ({"top_p": 0.6}, {2, 0}),
        ({"top_p": 0.95}, {2, 0, 1}),
        ({"top_k": 2, "top_p": 0.6}, {2}),  # of the two that are left the first has 0.625
        ({"top_k": 3, "top_p": 0.65}, {2, 0}),
    ],
    ids=str,
)
def test_what_is_cut(cut: dict, kept: set[int]) -> None:
    logits = torch.tensor([0.3, 0.15, 0.5, 0.05]).log().expand(2000, 4)
    tokens, _ = Sampler(settings(**cut))(logits, uniform(2000))
    assert set(tokens.tolist()) == kept


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_tokens_follow_the_distribution(cut: dict) -> None:
    probabilities = torch.tensor([0.3, 0.15, 0.4, 0.1, 0.05])
    n, kept = 40_000, {(): 5, ("top_k",): 3, ("top_p",): 4}[tuple(cut)]
    tokens, _ = Sampler(settings(**cut))(probabilities.log().expand(n, 5), uniform(n))
    expected = torch.where(probabilities >= probabilities.sort(descending=True).values[kept - 1], probabilities, 0.0)
    frequency = torch.bincount(tokens, minlength=5) / n
    assert torch.allclose(frequency, expected / expected.sum(), atol=0.01)
