"""Policy, reference, reward model and critic on one quantized base: one storage, the gradients of separate models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.models import RoleModel, load_base
from tests.models.tiny import LORA, logits, loss, randomise, token_ids

SEEDS = {"policy": 1, "reference": 2, "reward": 3, "critic": 4}


def score(causal_lm, ids, head):
    return head(causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state[:, -1])[:, 0]


def value_loss(causal_lm, ids, head):
    return (head(causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state)[..., 0] - 1).pow(2).mean()


def build(folder: Path, *names: str, checkpointing: bool = False) -> RoleModel:
    roles = RoleModel(load_base(folder, quantization="nf4"), gradient_checkpointing=checkpointing)
    for name in names:
        roles.add_adapter(name, settings=LORA, trainable=name in ("policy", "critic"))
        randomise(roles, name, SEEDS[name])
        if name in ("reward", "critic"):
            roles.add_head(name, seed=SEEDS[name])
    return roles.train()


def own(roles: RoleModel, role: str) -> dict[str, torch.Tensor]:
    return {name: tensor.grad for name, tensor in roles.tensors(role).items()}


@pytest.mark.parametrize("make", ["llama", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_two_models(folders: dict[str, Path], make: str, checkpointing: bool) -> None:
    ids = token_ids()
    four = build(folders[make], *SEEDS, checkpointing=checkpointing)
    a, b = four("policy", loss, ids, beside=[("critic", value_loss)])
    (a + 0.5 * b).backward()
    policy, critic = build(folders[make], "policy"), build(folders[make], "critic")
    policy("policy", loss, ids).backward()
    (0.5 * critic("critic", value_loss, ids)).backward()
    for role, alone in (("policy", policy), ("critic", critic)):
        found, expected = own(four, role), own(alone, role)
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
    assert all(t.grad is None for role in ("reference", "reward") for t in four.tensors(role).values())
    assert four.trained_roles == ("policy", "critic")


def test_one_storage_and_frozen_roles_do_not_move(folders: dict[str, Path]) -> None:
    four, ids = build(folders["llama"], *SEEDS), token_ids()
    base = {n: p for n, p in four.named_parameters() if ".role_" not in n and not n.startswith("heads.")}
    storages = {n: p.untyped_storage().data_ptr() for n, p in base.items()}
    adapter = sum(t.numel() for t in four.tensors("policy").values())
    others = sum(p.numel() for n, p in four.named_parameters() if n not in base)
    assert others == 4 * adapter + 2 * four.config.hidden_size, "four adapters and two heads are all there is beside it"
    with torch.no_grad():
        before = [four("reference", logits, ids), four("reward", score, ids)]
    optimizer = torch.optim.AdamW([p for p in four.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        a, b = four("policy", loss, ids, beside=[("critic", value_loss)])
        (a + b).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = [four("reference", logits, ids), four("reward", score, ids)]
    assert all(map(torch.equal, before, after)), "bit for bit"
    assert {n: p.untyped_storage().data_ptr() for n, p in base.items()} == storages
    assert len({id(p) for p in base.values()}) == len(base)


def test_state_holds_both_trained_roles(folders: dict[str, Path]) -> None:
    four, fresh = build(folders["llama"], *SEEDS), build(folders["llama"], *SEEDS)
    with torch.no_grad():
        for tensor in four.trainable_state().values():
            tensor.mul_(1.5)
    state = {name: tensor.detach().clone() for name, tensor in four.trainable_state().items()}
    assert len(state) == len(four.tensors("policy")) + len(four.tensors("critic"))
    fresh.load_trainable_state(state)
    for role in ("policy", "critic"):
        for name, tensor in fresh.tensors(role).items():
            assert torch.equal(tensor, four.tensors(role)[name])
