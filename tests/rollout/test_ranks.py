"""Two ranks draw what one process draws, with as much work each or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from align.models import RoleModel, load_base, load_tokenizer, lora
from align.rollout import keyed_draws, proof, sample
from align.rollout.beam import beam
from tests.distributed.ranks import run_ranks
from tests.models.test_wrapped import config
from tests.models.tiny import LORA, randomise
from tests.rollout.plain import settings

pytest.importorskip("deepspeed")
assert lora  # imported here, because forked ranks would each need seconds for it

SHARES = {"even": [[0, 2, 4, 6], [1, 3, 5, 7]], "uneven": [[0, 1, 2, 3, 4, 5, 6], [7]], "nothing": [[*range(8)], []]}


def any_rank(mine: bool) -> bool:
    flag = torch.tensor([float(mine)])
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def draw(rank: int, world: int, folder: Path, wrapper: str, share: list[list[int]], how: str) -> dict[int, Any]:
    if wrapper == "zero3":
        from transformers.integrations import HfDeepSpeedConfig

        keep = HfDeepSpeedConfig(config(wrapper))  # noqa: F841  transformers looks for it while a model is loaded
    roles = RoleModel(load_base(folder))
    roles.add_adapter("policy", settings=LORA, trainable=True, seed=1)
    randomise(roles, "policy", seed=2)
    model: Any = roles
    if wrapper == "ddp":
        model = DistributedDataParallel(roles)
    elif wrapper != "none":
        import deepspeed

        optimizer = torch.optim.SGD([p for p in roles.parameters() if p.requires_grad], lr=0.5)
        model, *_ = deepspeed.initialize(model=roles, optimizer=optimizer, config=config(wrapper))
        assert any(hasattr(p, "ds_id") for p in roles.parameters()) == (wrapper == "zero3")
    if how == "generate" or (how == "one generates" and rank == 1):
        proof._unfit = lambda *_: "the test says so"
    own = share[rank]
    prompts = [[5 + (7 * i * t) % 250 for t in range(1, 3 + 2 * i)] for i in own]
    tokenizer = load_tokenizer(folder)
    wanted = settings(max_new_tokens=6, batch_size=5)
    synced = any_rank if wrapper == "zero3" else None
    if how == "beam":
        found = beam(model, "policy", prompts, wanted, tokenizer, beams=2, synced=synced)
    else:
        draws = keyed_draws(0, own)
        found = sample(model, "policy", prompts, wanted, tokenizer, completions=2, draws=draws, synced=synced)
    return {i: [(each.ids, each.logps) for each in one] for i, one in zip(own, found, strict=True)}


@pytest.fixture(scope="module")
def alone(folders) -> dict[str, dict[int, Any]]:
    one = [[*range(8)]]
    found = {
        how: run_ranks(draw, folders["qwen2"], "none", one, how, world=1)[0] for how in ("loop", "generate", "beam")
    }
    return found | {"one generates": found["generate"]}


@pytest.mark.parametrize(
    ("wrapper", "share", "how"),
    [
        ("ddp", "nothing", "loop"),
        ("zero2", "uneven", "loop"),
        ("zero3", "even", "loop"),
        ("zero3", "uneven", "loop"),
        ("zero3", "nothing", "loop"),
        ("zero3", "uneven", "generate"),
        ("zero3", "uneven", "one generates"),
        ("zero3", "uneven", "beam"),
    ],
)
def test_ranks_draw_what_one_process_draws(folders, alone, wrapper: str, share: str, how: str) -> None:
    parts = run_ranks(draw, folders["qwen2"], wrapper, SHARES[share], how, deepspeed=wrapper != "ddp")
    found = parts[0] | parts[1]
    assert found.keys() == alone[how].keys()
    for i, own in found.items():
        assert [ids for ids, _ in own] == [ids for ids, _ in alone[how][i]]
        for (_, logps), (_, expected) in zip(own, alone[how][i], strict=True):
            assert logps == pytest.approx(expected, abs=1e-5)
