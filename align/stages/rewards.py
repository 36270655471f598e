"""A reward model of the store that scores texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from align.artifacts.store import Store
from align.data import ChatEncoder, Example
from align.data.records import Message, Samples, Unpaired
from align.logps.engine import choose_packing
from align.logps.score import completion_scores
from align.models.policies import locate
from align.models.rewards import load_reward
from align.models.tokenizer import load_tokenizer
from align.recipe.rope import rope_of
from align.recipe.sizes import positions_of

PACK_TOKENS = 8192
"""Token budget of one forward pass."""
ROLE = "reward"
TOO_LONG = "longer than the reward model reads"
ANY_LENGTH = 2**20


class RewardModel:
    """A reward model with the tokenizer it was trained with.

    Args:
        store: Where it is.
        fingerprint: Of the stage that trained it.

    Raises:
        ArtifactError: It is not in the store, is damaged, or is no reward model.
    """

    def __init__(self, store: Store, fingerprint: str) -> None:
        self.roles, _ = load_reward(store, fingerprint, ROLE)
        config = self.roles.config.to_dict()
        rope = rope_of(config)
        positions = rope.positions if rope is not None else positions_of(config)
        self.encoder = ChatEncoder(load_tokenizer(locate(store, fingerprint, "reward").folder), positions or ANY_LENGTH)
        with torch.no_grad():
            self.packing = self.roles(ROLE, lambda lm, *_: choose_packing(lm, dropout=False, wanted="auto"))

    def __call__(self, asked: Sequence[Samples], texts: Sequence[Sequence[str]]) -> list[dict[str, float | str]]:
        """For each prompt text -> reward, or the reason why it has none.

        Args:
            asked: The prompts.
            texts: Answers to each, no two of them the same. Each is read as if it had ended.
        """
        found: list[dict[str, float | str]] = [{} for _ in asked]
        examples, places = [], []
        for i, (samples, answers) in enumerate(zip(asked, texts, strict=True)):
            encoded = dict(self._encoded(samples, answers))
            found[i] |= {text: outcome for text, outcome in encoded.items() if isinstance(outcome, str)}
            whole = {text: outcome for text, outcome in encoded.items() if isinstance(outcome, Example)}
            if whole:
                first = next(iter(whole.values()))
                examples.append(replace(first, completions=tuple(each.completions[0] for each in whole.values())))
                places.append((i, list(whole)))
        rewards = completion_scores(self.roles, ROLE, examples, PACK_TOKENS, self.packing)
        for (i, whole_texts), own in zip(places, rewards, strict=True):
            found[i] |= dict(zip(whole_texts, own, strict=True))
        return found

    def _encoded(self, samples: Samples, texts: Sequence[str]) -> Iterator[tuple[str, Example | str]]:
        """Each text as an example, or why it cannot be one."""
        records = [
            Unpaired(samples.row, samples.prompt, [Message(role="assistant", content=text)], True) for text in texts
        ]
        for text, outcome in zip(texts, self.encoder.encode_many(records), strict=True):
            if not isinstance(outcome, Example):
                yield text, str(outcome)
            elif outcome.completions[0].truncated:
                yield text, TOO_LONG
            else:
                yield text, outcome
