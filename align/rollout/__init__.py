"""Completions drawn from a policy."""

from align.rollout.local import generate

__all__ = ["generate"]
