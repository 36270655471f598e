"""The DeepSpeed files are what DeepSpeed understands, leave the recipe in charge, and are explained line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

STAGES = (1, 2, 3)
FILLED_FROM_THE_RECIPE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
)


def read(repository: Path, stage: int) -> dict[str, Any]:
    return json.loads((repository / "ds_configs" / f"zero{stage}.json").read_text())


def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_knows_every_key(repository: Path, stage: int) -> None:
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = read(repository, stage)
    known = {value for value in vars(constants).values() if isinstance(value, str)} | {"zero_optimization"}
    assert set(config) <= known
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])  # refuses a key that it does not know
    assert zero.stage == stage


@pytest.mark.parametrize("stage", STAGES)
def test_the_recipe_decides(repository: Path, stage: int) -> None:
    values = dict(leaves(read(repository, stage)))
    assert {key: values[key] for key in FILLED_FROM_THE_RECIPE} == dict.fromkeys(FILLED_FROM_THE_RECIPE, "auto")
    assert not {"optimizer", "scheduler"} & set(read(repository, stage))
    assert values["zero_force_ds_cpu_optimizer"] is False  # else a compiler is needed


def test_every_line_is_explained(repository: Path) -> None:
    readme = (repository / "ds_configs" / "README.md").read_text()
    used = {key for stage in STAGES for key, _ in leaves(read(repository, stage))}
    assert {key for key in used if f"| `{key}` |" not in readme} == set()
