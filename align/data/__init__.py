"""Data: rows become records, records become token ids with a mask, and what is left out on the way is counted."""

from align.data.chat import ChatEncoder, Completion, Example
from align.data.check import PromptExample, load_examples, load_prompts, split_validation, training_texts
from align.data.report import DataReport

__all__ = [
    "ChatEncoder",
    "Completion",
    "DataReport",
    "Example",
    "PromptExample",
    "load_examples",
    "load_prompts",
    "split_validation",
    "training_texts",
]
