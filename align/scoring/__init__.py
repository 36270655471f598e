"""Completions to scores."""

from align.scoring.combine import Blend, Blended
from align.scoring.function import FunctionScorer, load_function
from align.scoring.registry import Scorer, columns_read, get_scorer, labels, score_completion, score_label

__all__ = [
    "Blend",
    "Blended",
    "FunctionScorer",
    "Scorer",
    "columns_read",
    "get_scorer",
    "labels",
    "load_function",
    "score_completion",
    "score_label",
]
