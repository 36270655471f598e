"""Uniform numbers that decide which tokens are drawn: they belong to a completion, not to the batch it is drawn in.

A token is the one whose slice of the cumulative distribution holds the number of its row and step. So the batch size,
the order of prompts and how they are dealt out to ranks change speed alone (up to the rounding of logits), and two
policies asked with one seed get common random numbers, which makes their comparison sharper.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align.spec.stages import GenerationSettings

Draws = Callable[[int, int], Tensor]
"""(prompt, completion), by their places -> [max_new_tokens or more] uniform numbers in [0, 1), fp64."""


def listed_draws(n: int, settings: GenerationSettings, completions: int = 1) -> Draws:
    """One table for a list of prompts, from `settings.seed`: a prompt's numbers depend on its place in the list.

    Args:
        n: Prompts in the list.
        settings: Reads `seed` and `max_new_tokens`.
        completions: Per prompt.
    """
    table = torch.rand(
        n * completions,
        settings.max_new_tokens,
        generator=torch.Generator().manual_seed(settings.seed),
        dtype=torch.float64,
    )
    return lambda prompt, completion: table[prompt * completions + completion]


def keyed_draws(seed: int, keys: Sequence[int], tokens: int = 8192) -> Draws:
    """Numbers of their own for every key and completion, whatever else is in the list.

    Args:
        seed: Of the run, or of the round.
        keys: What tells each prompt of the list apart, such as its row in the data.
        tokens: Numbers per completion; fewer of them are the beginning of more.
    """

    def draw(prompt: int, completion: int) -> Tensor:
        name = f"{seed} {keys[prompt]} {completion}".encode()
        own = int.from_bytes(hashlib.blake2b(name, digest_size=7).digest())
        return torch.rand(tokens, generator=torch.Generator().manual_seed(own), dtype=torch.float64)

    return draw
