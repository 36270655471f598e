"""Roles under the wrappers of two ranks: every pass goes through the wrapper's forward, every role stays itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from align.models import RoleModel, load_base, lora
from tests.distributed.ranks import run_ranks
from tests.models.tiny import LORA, logits, loss, randomise, token_ids

pytest.importorskip("deepspeed")
assert lora  # imported here, because forked ranks would each need seconds for it

STEPS = 3


def train(rank: int, world: int, folder: Path, wrapper: str, checkpointing: bool) -> dict[str, np.ndarray]:
    """A few SGD steps, each rank on its half of the rows; what the roles compute before and after."""
    if wrapper == "zero3":
        from transformers.integrations import HfDeepSpeedConfig

        keep = HfDeepSpeedConfig(config(wrapper))  # noqa: F841  transformers looks for it while a model is loaded
    roles = RoleModel(load_base(folder, quantization="nf4"), gradient_checkpointing=checkpointing)
    roles.add_adapter("policy", settings=LORA, trainable=True, seed=1)
    randomise(roles, "policy", seed=2)
    roles.add_adapter("reference", copy_of="policy", trainable=False)
    roles.add_base_role("base")
    trained = [p for p in roles.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    engine = None
    if wrapper == "ddp":
        model = DistributedDataParallel(roles)
    elif wrapper == "none":
        model = roles
    else:
        import deepspeed

        model, *_ = deepspeed.initialize(model=roles, optimizer=optimizer, config=config(wrapper))
        engine = model
    ids = token_ids(rows=4)
    own = ids[rank::world]

    def outputs() -> dict[str, np.ndarray]:
        model.eval()
        with torch.no_grad():
            return {role: model(role, logits, ids).numpy() for role in roles.roles}

    before = outputs()
    for _ in range(STEPS):
        model.train()
        value = model("policy", loss, own)
        if engine is None:
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        else:
            engine.backward(value)
            engine.step()
    after = outputs()
    sharded = any(hasattr(p, "ds_id") for p in roles.parameters())
    return {f"before/{k}": v for k, v in before.items()} | after | {"sharded": np.array(sharded)}


def config(wrapper: str) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": int(wrapper[-1]), "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, np.ndarray]:
    return run_ranks(train, folders["qwen2"], "none", False, world=1)[0]


@pytest.mark.parametrize(("wrapper", "checkpointing"), [("ddp", True), ("zero2", False), ("zero3", True)])
def test_two_wrapped_ranks_equal_one_bare_model(folders, alone, wrapper: str, checkpointing: bool) -> None:
    for result in run_ranks(train, folders["qwen2"], wrapper, checkpointing, deepspeed=wrapper != "ddp"):
        assert result["sharded"] == (wrapper == "zero3")
        for role in ("reference", "base"):
            assert np.array_equal(result[role], result[f"before/{role}"]), role
        np.testing.assert_allclose(result["policy"], alone["policy"], atol=1e-5)
        assert np.abs(result["policy"] - result["before/policy"]).max() > 1e-2
        assert np.abs(result["policy"] - result["reference"]).max() > 1e-2
