from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from align.errors import RecipeError, TrainingError
from align.models import RoleModel, load_base
from align.spec.model import LoraSettings
from tests.models.tiny import LORA, logits, loss, randomise, token_ids


def gradients(roles: RoleModel) -> dict[str, torch.Tensor]:
    roles.zero_grad()
    roles("policy", loss, token_ids()).backward()
    return {n: p.grad.clone() for n, p in roles.named_parameters() if p.grad is not None}


def test_training_reaches_the_policy_alone(policy_and_reference: RoleModel) -> None:
    roles, ids = policy_and_reference, token_ids()
    with torch.no_grad():
        before = {role: roles(role, logits, ids) for role in roles.roles}
    assert not torch.equal(before["policy"], before["reference"])
    assert not torch.equal(before["base"], before["reference"])

    roles.train()
    optimizer = torch.optim.AdamW([p for p in roles.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        assert set(gradients(roles)) == {n for n, _ in roles.named_parameters() if ".role_policy." in n}
        optimizer.step()

    roles.eval()
    with torch.no_grad():
        after = {role: roles(role, logits, ids) for role in roles.roles}
    assert not torch.equal(before["policy"], after["policy"])
    assert torch.equal(before["reference"], after["reference"])
    assert torch.equal(before["base"], after["base"])


def test_eval_forward_leaves_training_as_it_was(policy_and_reference: RoleModel) -> None:
    """On AVX512-BF16 CPUs bitsandbytes repacks 4-bit weights in eval mode, and gradients go wrong without a word."""
    roles = policy_and_reference.train()
    first = gradients(roles)
    roles.eval()
    with torch.no_grad():
        for role in roles.roles:
            roles(role, logits, token_ids())
    roles.train()
    second = gradients(roles)
    assert first.keys() == second.keys() == {n for n, p in roles.named_parameters() if p.requires_grad}
    assert all(torch.equal(first[name], second[name]) and first[name].any() for name in first)


def test_base_role_is_the_pristine_base(model_kind: tuple[str, str], folders: dict[str, Path]) -> None:
    base = load_base(folders[model_kind[0]], quantization=model_kind[1])
    with torch.no_grad():
        pristine = logits(base, token_ids())
    roles = RoleModel(base)
    roles.add_base_role("reference")
    roles.add_adapter("policy", settings=LORA, trainable=True)
    with torch.no_grad():
        fresh = roles("policy", logits, token_ids())
    randomise(roles, "policy", seed=1)
    with torch.no_grad():
        assert torch.equal(roles("reference", logits, token_ids()), pristine)
        assert torch.equal(fresh, pristine), "a fresh adapter is the identity"


@pytest.fixture
def roles(folders: dict[str, Path]) -> RoleModel:
    roles = RoleModel(load_base(folders["llama"]))
    roles.add_adapter("policy", settings=LORA, trainable=True, seed=1)
    roles.add_adapter("reference", copy_of="policy", trainable=False)
    randomise(roles, "reference", seed=3)
    return roles


def test_switching_changes_no_flag_and_is_undone_after_an_error(roles: RoleModel) -> None:
    flags = {n: p.requires_grad for n, p in roles.named_parameters()}
    assert {n for n, on in flags.items() if on} == {n for n, _ in roles.named_parameters() if ".role_policy." in n}

    def fail(causal_lm) -> None:
        raise KeyError("inside")

    with torch.no_grad():
        expected = roles("policy", logits, token_ids())
        with roles.role("reference"):
            assert torch.equal(logits(roles.causal_lm, token_ids()), roles("reference", logits, token_ids()))
        with pytest.raises(KeyError), roles.role("reference"):
            fail(roles.causal_lm)
        with pytest.raises(KeyError):
            roles("reference", fail)
        assert torch.equal(expected, logits(roles.causal_lm, token_ids())), "the trained role is the resting role"
    assert flags == {n: p.requires_grad for n, p in roles.named_parameters()}


def test_nested_roles_come_back_in_order(roles: RoleModel) -> None:
    with torch.no_grad():
        reference = roles("reference", logits, token_ids())
        with roles.role("reference"):
            roles("policy", logits, token_ids())
            assert torch.equal(logits(roles.causal_lm, token_ids()), reference)


@pytest.mark.parametrize(
    "enter", [lambda r: r("reference", loss, token_ids()), lambda r: r.role("reference").__enter__()]
)
def test_frozen_roles_refuse_gradients(roles: RoleModel, enter) -> None:
    with pytest.raises(TrainingError, match="gradients are recorded"):
        enter(roles)


def test_gradients_inside_a_frozen_role_are_refused(roles: RoleModel) -> None:
    with torch.no_grad(), roles.role("reference"), torch.enable_grad(), pytest.raises(TrainingError, match="reference"):
        logits(roles.causal_lm, token_ids())


@pytest.mark.parametrize("make", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_checkpointing_gives_the_same_gradients(folders: dict[str, Path], make: str, full: bool) -> None:
    found = []
    for checkpointing in (False, True):
        roles = RoleModel(load_base(folders[make]), gradient_checkpointing=checkpointing)
        if full:
            roles.train_base()
        else:
            roles.add_adapter("policy", settings=LORA, trainable=True)
            randomise(roles, "policy", seed=1)
        roles.train()
        torch.manual_seed(0)
        found.append(gradients(roles))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_recomputation_sees_the_role_of_its_forward_pass(folders: dict[str, Path]) -> None:
    roles = RoleModel(load_base(folders["llama"]), gradient_checkpointing=True)
    roles.add_adapter("policy", settings=LORA, trainable=True)
    roles.add_base_role("base")
    randomise(roles, "policy", seed=1)
    roles.train()
    expected = gradients(roles)
    roles.zero_grad()
    value = roles("policy", loss, token_ids())
    with torch.no_grad(), roles.role("base"):
        value.backward()
    assert all(torch.equal(p.grad, expected[n]) for n, p in roles.named_parameters() if p.requires_grad)


def test_a_frozen_role_is_refused_while_gradients_are_recorded(policy_and_reference: RoleModel) -> None:
    with pytest.raises(TrainingError, match="frozen role 'reference'"):
        policy_and_reference("reference", loss, token_ids())
    policy_and_reference._activate("reference")
    with pytest.raises(TrainingError, match="role 'reference' is active"):
        loss(policy_and_reference.causal_lm, token_ids())


def test_full_training_reaches_every_parameter(folders: dict[str, Path]) -> None:
    roles = RoleModel(load_base(folders["llama"], dtype="bfloat16"))
    roles.train_base()
    assert {p.dtype for p in roles.parameters()} == {torch.float32}
    assert set(gradients(roles)) == {n for n, _ in roles.named_parameters()}
    assert roles("policy", logits, token_ids()).dtype == torch.bfloat16, "computed in the dtype that was asked for"
    with pytest.raises(ValueError, match="RoleModel of its own"):
        roles.add_base_role("reference")


def test_another_layout_has_body_and_head(folders: dict[str, Path]) -> None:
    roles = RoleModel(load_base(folders["gpt2"]))
    roles.add_base_role("policy")
    with torch.no_grad():
        own = roles("policy", logits, token_ids())
        torch.testing.assert_close(own, roles("policy", lambda m, ids: m(input_ids=ids).logits, token_ids()))


def test_seed_alone_decides_a_fresh_adapter(folders: dict[str, Path]) -> None:
    def fresh(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        roles = RoleModel(load_base(folders["llama"]))
        state = torch.random.get_rng_state()
        roles.add_adapter("policy", settings=LORA, trainable=True, seed=seed)
        assert torch.equal(state, torch.random.get_rng_state())
        return roles.tensors("policy")

    one, again, other = fresh(1, 0), fresh(1, 9), fresh(2, 0)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert all(torch.equal(one[n], other[n]) == ("lora_B" in n) for n in one)
    assert {t.dtype for t in one.values()} == {torch.float32}


def test_adapter_is_fp32_on_a_bf16_base(folders: dict[str, Path]) -> None:
    roles = RoleModel(load_base(folders["llama"], dtype="bfloat16"))
    roles.add_adapter("policy", settings=LORA, trainable=True)
    assert {t.dtype for t in roles.tensors("policy").values()} == {torch.float32}
    assert set(gradients(roles)) == {n for n, p in roles.named_parameters() if p.requires_grad}


def test_copy_is_bitwise_and_separate(roles: RoleModel) -> None:
    roles.add_adapter("copy", copy_of="reference", trainable=False)
    copied, original = roles.tensors("copy"), roles.tensors("reference")
    assert copied.keys() == original.keys()
    assert all(torch.equal(copied[n], original[n]) and copied[n] is not original[n] for n in copied)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (LoraSettings(rank=4, alpha=16), "rank"),
        (LoraSettings(rank=8, alpha=32), "alpha"),
        (LoraSettings(rank=8, alpha=16, rslora=True), "rslora"),
        (LoraSettings(rank=8, alpha=16, targets=["q_proj", "v_proj"]), "has shape .* the stage wants nothing"),
    ],
    ids=["rank", "alpha", "rslora", "targets"],
)
def test_a_copy_with_other_settings_is_refused(roles: RoleModel, settings: LoraSettings, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason) as caught:
        roles.add_adapter("copy", copy_of="policy", settings=settings, trainable=False)
    assert "merge_parent" in caught.value.fix


def test_dropout_is_the_trained_roles_own(folders: dict[str, Path]) -> None:
    roles = RoleModel(load_base(folders["llama"]))
    roles.add_adapter("policy", settings=LORA.model_copy(update={"dropout": 0.5}), trainable=True)
    randomise(roles, "policy", seed=1)
    roles.add_adapter("reference", copy_of="policy", trainable=False)
    with torch.no_grad():
        assert torch.equal(roles("policy", logits, token_ids()), roles("reference", logits, token_ids())), "eval mode"
        reference = roles("reference", logits, token_ids())
        roles.train()
        assert torch.equal(roles("reference", logits, token_ids()), reference)
        assert not torch.equal(roles("policy", logits, token_ids()), reference)


def test_somebodys_adapter_is_trained_with_the_dropout_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    made = RoleModel(load_base(folders["llama"]))
    made.add_adapter("policy", settings=LORA.model_copy(update={"dropout": 0.5}), trainable=True)
    randomise(made, "policy", seed=1)
    made.adapter_config("policy").save_pretrained(tmp_path)
    state = {name: tensor.detach().clone() for name, tensor in made.tensors("policy").items()}
    save_file(state, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    continued = RoleModel(load_base(folders["llama"]))
    continued.add_adapter("policy", folder=tmp_path, dropout=0.0, trainable=True)
    continued.train()
    with torch.no_grad():
        passes = [continued("policy", logits, token_ids()) for _ in range(2)]
    assert torch.equal(*passes)
    assert continued.adapter_config("policy").lora_dropout == 0.0


def test_unknown_target_is_named(folders: dict[str, Path]) -> None:
    roles = RoleModel(load_base(folders["llama"]))
    with pytest.raises(RecipeError, match="no module 'query_proj'") as caught:
        roles.add_adapter("policy", settings=LoraSettings(targets=["q_proj", "query_proj"]), trainable=True)
    assert "q_proj" in caught.value.fix


@pytest.mark.parametrize("name", ["train", "keys", "sft.v2", "a-b"])
def test_any_stage_name_is_a_role(folders: dict[str, Path], name: str) -> None:
    roles = RoleModel(load_base(folders["llama"]))
    roles.add_adapter(name, settings=LORA, trainable=False)
    with torch.no_grad():
        roles(name, logits, token_ids())
    assert all(n.endswith((".lora_A.weight", ".lora_B.weight")) for n in roles.tensors(name))


def test_wrong_use_is_told(roles: RoleModel) -> None:
    with pytest.raises(ValueError, match="already"):
        roles.add_adapter("policy", settings=LORA, trainable=False)
    with pytest.raises(ValueError, match="no role 'critic'"), torch.no_grad():
        roles("critic", logits, token_ids())


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_trainable_state_round_trip(folders: dict[str, Path], full: bool) -> None:
    def build(seed: int) -> RoleModel:
        roles = RoleModel(load_base(folders["llama"]))
        if full:
            roles.train_base()
        else:
            roles.add_adapter("policy", settings=LORA, trainable=True, seed=seed)
            randomise(roles, "policy", seed=seed)
        return roles

    trained, fresh = build(1), build(2)
    with torch.no_grad():
        for tensor in trained.trainable_state().values():
            tensor.mul_(1.5)
        expected = trained("policy", logits, token_ids())
        fresh.load_trainable_state(copy.deepcopy(trained.trainable_state()))
        assert torch.equal(fresh("policy", logits, token_ids()), expected)
    with pytest.raises(TrainingError, match="1 tensors"):
        fresh.load_trainable_state(dict(list(trained.trainable_state().items())[1:]))
