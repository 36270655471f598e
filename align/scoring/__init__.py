"""Completions to scores."""

from align.scoring.registry import Scorer, get_scorer, score_label

__all__ = ["Scorer", "get_scorer", "score_label"]
