"""Completions to scores."""

from align.scoring.registry import Scorer, columns_read, get_scorer, labels, score_completion, score_label

__all__ = ["Scorer", "columns_read", "get_scorer", "labels", "score_completion", "score_label"]
