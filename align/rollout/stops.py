"""Strings that end a completion, wherever the borders of tokens fall."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

MARGIN = 4
"""Tokens before those that can hold a string: a text cut there may lose a space or begin inside a character."""


class Stops:
    """Says when the last token of a completion has completed one of the strings.

    Args:
        strings: What ends a completion; may be none.
        tokenizer: Makes the text, special tokens included, so that a string may name one.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings, self.tokenizer = tuple(strings), tokenizer
        # A token is at least one byte of text, so a string that ends in the last one began no further back than this.
        self.tokens = max((len(string.encode()) for string in self.strings), default=0) + MARGIN

    def __bool__(self) -> bool:
        return bool(self.strings)

    def reached(self, completions: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each completion, which held no string before its last token, holds one now."""
        if not self.strings or not completions:
            return [False] * len(completions)
        tails = [list(ids[-self.tokens :]) for ids in completions]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [any(string in text for string in self.strings) for text in texts]

    def first(self, ids: Sequence[int]) -> int | None:
        """The number of tokens after which a completion ends; None if it holds no string."""
        return next((n for n in range(1, len(ids) + 1) if self.reached([ids[:n]])[0]), None) if self.strings else None
