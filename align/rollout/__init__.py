"""Completions drawn from a policy."""

from align.rollout.draws import Draws, keyed_draws, listed_draws
from align.rollout.engine import Engine, Sampled, get_engine
from align.rollout.local import generate, sample

__all__ = ["Draws", "Engine", "Sampled", "generate", "get_engine", "keyed_draws", "listed_draws", "sample"]
