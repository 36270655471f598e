"""What draws completions: one small interface, and the engines behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from transformers import PreTrainedTokenizerBase

from align.rollout.draws import Draws
from align.spec.stages import GenerationSettings

Tell = Callable[[int, int], None]
"""Called with (completions done, completions in all)."""
Synced = Callable[[bool], bool]
"""Called before every forward pass with whether this rank has work left; says whether any rank has."""
Name = Literal["local", "transformers", "vllm"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One completion.

    Attributes:
        ids: Its tokens, the ending one included if one was drawn.
        logps: The log-probability of each in nats, fp32: of `log_softmax(logits / temperature)` before top-k and top-p
            cut anything; at temperature 0 of the plain `log_softmax`.
        ended: Whether it ended by itself: by a token that ends a turn, or by a stop string.
    """

    ids: list[int]
    logps: list[float]
    ended: bool


class Engine(Protocol):
    """Draws completions of a role; see `align.rollout.local.sample` for the arguments."""

    def sample(
        self,
        roles: Any,
        role: str,
        prompts: Sequence[list[int]],
        settings: GenerationSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        completions: int = 1,
        draws: Draws | None = None,
        tell: Tell | None = None,
        synced: Synced | None = None,
    ) -> list[list[Sampled]]:
        """For each prompt its completions, in order."""


def get_engine(name: Name) -> Engine:
    """The engine of a name.

    `local` is align's own loop in this process; the others are peers that know nothing of `draws`, so that their
    completions depend on the batch.

    Raises:
        LaunchError: What it needs is not installed.
    """
    if name == "local":
        from align.rollout.local import LocalEngine

        return LocalEngine()
    if name == "transformers":
        from align.rollout.batched import BatchedEngine

        return BatchedEngine()
    if name == "vllm":
        from align.rollout.vllm import VllmEngine

        return VllmEngine()
    raise ValueError(f"no engine {name!r}; there are {', '.join(get_args(Name))}")
