"""One recipe under several seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.recipe import load_recipe
from align.spec.data import GeneratedData
from align.spec.online import RolloutStage
from align.spec.sample import SampleStage
from align.spec.stages import CompareStage, TrainedStage


def overrides(recipe: Path, seed: int, suffix: str = "") -> list[str]:
    """The settings that a seed changes: the data's, the stages', the sampling's, and the name of the run.

    Args:
        recipe: A recipe of the quickstart.
        seed: Added to the recipe's own.
        suffix: Of the name, for a variant of the run.
    """
    loaded = load_recipe(recipe)
    sets = [f"name={loaded.recipe.name}-seed{seed}{suffix}"]
    generated = {n: each for n, each in loaded.recipe.data.items() if isinstance(each, GeneratedData)}
    sets += [f"data.{n}.seed={seed + source.seed}" for n, source in generated.items()]
    for name, stage in loaded.stages.items():
        if isinstance(stage, TrainedStage):
            sets.append(f"stages.{name}.train.seed={seed}")
        if isinstance(stage, CompareStage | RolloutStage | SampleStage):
            sets.append(f"stages.{name}.generation.seed={seed + stage.generation.seed}")
    return sets


def interval(value: Mapping[str, Any]) -> str:
    """`mean [low, high]`."""
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
