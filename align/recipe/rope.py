"""Rotary positions whose frequencies follow the longest sequence of a batch.

transformers computes `dynamic` and `longrope` so. Beyond the length that a model was first made for, the
log-probabilities of a sequence then depend on what stands beside it in a pack, and a reference that was computed in
another pack disagrees with the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from align.errors import RecipeError


@dataclass(frozen=True)
class Rope:
    """A kind of rotary positions, and the longest batch in which all sequences have the same frequencies."""

    kind: str
    positions: int

    def refusal(self, max_tokens: int, base: str, where: str, written: bool = True) -> RecipeError:
        """What is told about sequences that are longer than that."""
        return RecipeError(
            f"max_tokens {max_tokens}{'' if written else ' (the default)'} is more than the {self.positions} positions "
            f"that {base} was first made for: with its rope_type {self.kind}, the log-probabilities of longer "
            "sequences depend on what else is in the batch",
            where=where,
            fix=f"lower max_tokens to {self.positions}",
        )


def rope_of(config: dict[str, Any]) -> Rope | None:
    """What a model's configuration says of such positions; None if its frequencies are the same in every batch.

    Example:
        >>> rope_of({"max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
        Rope(kind='dynamic', positions=64)
    """
    return min(_found(text_config(config)), key=lambda rope: rope.positions, default=None)


def check_rope(config: Any, max_tokens: int, base: str = "the model") -> None:
    """Refuse to train on too long sequences with a model that has been loaded.

    Args:
        config: A transformers configuration; its text part is read.
        max_tokens: The longest sequence.
        base: What the model is called.

    Raises:
        RecipeError: They are longer than its frequencies are the same for.
    """
    rope = rope_of(config.get_text_config().to_dict())
    if rope is not None and max_tokens > rope.positions:
        raise rope.refusal(max_tokens, base, "train.max_tokens")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is of the language model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def rope_parameters(text: dict[str, Any]) -> list[dict[str, Any]]:
    """What a configuration says of rotary positions, of all layers or of each type of layer."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return [each for each in (rope, *rope.values()) if isinstance(each, dict)] if isinstance(rope, dict) else []


def _found(text: dict[str, Any]) -> Iterator[Rope]:
    for each in rope_parameters(text):
        kind, longest = each.get("rope_type") or each.get("type"), text.get("max_position_embeddings")
        if kind == "su" or (kind == "yarn" and "long_factor" in each):  # names that Phi-3 had for it
            kind = "longrope"
        if kind == "longrope":  # transformers, too, lets the field beside the parameters win
            beside, inside = (part.get("original_max_position_embeddings") for part in (text, each))
            longest = beside or inside or longest
        elif kind != "dynamic" or each.get("alpha"):  # HunYuan's fixed alpha makes `dynamic` the same in every batch
            continue
        if isinstance(longest, int):
            yield Rope(str(kind), longest)
