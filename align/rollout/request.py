"""What a rollout is asked for, and the state that any model has to be in meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.errors import RecipeError
from align.models.tokenizer import end_ids
from align.rollout.draws import Draws, listed_draws
from align.rollout.engine import Sampled, Synced, Tell
from align.rollout.stops import Stops
from align.spec.stages import GenerationSettings


@dataclass(frozen=True)
class Request:
    """All completions of a list of prompts.

    Attributes:
        prompts: Token ids, at least one each.
        settings: How completions are drawn.
        tokenizer: Decides padding, the ends of turns and what text a stop string is looked for in.
        completions: k, per prompt.
        given_draws: The uniform numbers; None for `listed_draws`.
        tell: Told of progress.
        synced: Keeps ranks in step.
    """

    prompts: Sequence[list[int]]
    settings: GenerationSettings
    tokenizer: PreTrainedTokenizerBase
    completions: int = 1
    given_draws: Draws | None = None
    tell: Tell | None = None
    synced: Synced | None = None

    @property
    def total(self) -> int:
        """Completions in all."""
        return len(self.prompts) * self.completions

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts), default=1)

    @cached_property
    def stops(self) -> Stops:
        """The stop strings."""
        return Stops(self.settings.stop, self.tokenizer)

    @cached_property
    def _draws(self) -> Draws:
        return self.given_draws or listed_draws(len(self.prompts), self.settings, self.completions)

    def draws(self, prompt: int, completion: int) -> Tensor:
        """[max_new_tokens] uniform numbers."""
        numbers = self._draws(prompt, completion)
        if len(numbers) < self.settings.max_new_tokens:
            raise ValueError(f"{len(numbers)} uniform numbers do not suffice for {self.settings.max_new_tokens} tokens")
        return numbers[: self.settings.max_new_tokens]

    def ends(self, causal_lm: Any) -> set[int]:
        """Tokens that end a completion: the tokenizer's and the model's."""
        own = causal_lm.generation_config.eos_token_id
        return end_ids(self.tokenizer) | (set() if own is None else {own} if isinstance(own, int) else set(own))

    def check(self, config: Any) -> None:
        """Refuse what cannot be completed.

        Raises:
            RecipeError: If a prompt and its completion would not fit into the model's positions.
        """
        if not all(self.prompts):
            raise ValueError("a prompt without tokens cannot be completed")
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        new, longest = self.settings.max_new_tokens, max(map(len, self.prompts), default=0)
        if positions is not None and longest + new > positions:
            raise RecipeError(
                f"a prompt of {longest} tokens and {new} new ones do not fit into the model's {positions} positions",
                where="generation.max_new_tokens",
                fix=f"set it to at most {positions - longest}, or leave long prompts out",
            )


class Found:
    """Completions as they come in, told of as they do."""

    def __init__(self, request: Request) -> None:
        self.request, self.done = request, 0
        self.rows: list[list[Any]] = [[None] * request.completions for _ in request.prompts]

    def add(self, prompt: int, completion: int, sampled: Sampled) -> None:
        """Keep one."""
        self.rows[prompt][completion] = sampled
        self.done += 1

    def tell(self) -> None:
        """Say how many there are."""
        if self.request.tell is not None:
            self.request.tell(self.done, self.request.total)


@contextmanager
def drawing(model: Any) -> Iterator[None]:
    """No gradient, no dropout, and no gradient checkpointing, which would throw the cache away."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
