"""Tiny models in all makes, from the tests of the model layer."""

from tests.models.conftest import folders, tokenizer

__all__ = ["folders", "tokenizer"]
