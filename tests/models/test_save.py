from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from align.errors import RecipeError
from align.models import RoleModel, load_base
from align.models.base import quantization_config
from align.models.save import merge_adapter, save_policy
from align.spec.model import LoraSettings
from tests.models.tiny import LORA, logits, randomise, token_ids


def trained(folder: Path, quantization: str, settings: LoraSettings = LORA) -> RoleModel:
    roles = RoleModel(load_base(folder, quantization=quantization))
    roles.add_adapter("policy", settings=settings, trainable=True, seed=1)
    randomise(roles, "policy", seed=2)
    return roles


def quantized(quantization: str) -> dict:
    return {} if quantization == "none" else {"quantization_config": quantization_config(quantization, torch.float32)}


@torch.no_grad()
def policy_logits(roles: RoleModel, role: str = "policy") -> torch.Tensor:
    return roles(role, logits, token_ids())


def test_adapter_reloads_bit_for_bit(
    model_kind: tuple[str, str], folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    make, quantization = model_kind
    roles = trained(folders[make], quantization)
    out = save_policy(roles, "policy", tmp_path, tokenizer=tokenizer, base_reference=str(folders[make]))
    expected = policy_logits(roles)

    auto = AutoPeftModelForCausalLM.from_pretrained(str(out), dtype=torch.float32, **quantized(quantization))
    base = AutoModelForCausalLM.from_pretrained(folders[make], dtype=torch.float32, **quantized(quantization))
    plain = PeftModel.from_pretrained(base, str(out))
    own = RoleModel(load_base(folders[make], quantization=quantization))
    own.add_adapter("reference", folder=out, trainable=False)
    with torch.no_grad():
        assert torch.equal(auto(input_ids=token_ids()).logits, expected)
        assert torch.equal(plain(input_ids=token_ids()).logits, expected)
        assert torch.equal(policy_logits(own, "reference"), expected)


def test_adapter_folder_says_nothing_of_roles_and_is_the_same_every_time(
    folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    outs = []
    for name in ("a", "b"):
        roles = trained(folders["llama"], "none")
        out = save_policy(
            roles, "policy", tmp_path / name, tokenizer=tokenizer, base_reference="org/base", base_revision="abc"
        )
        outs.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert outs[0] == outs[1]
    keys = load_file(out / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") and "policy" not in name for name in keys)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template


def test_full_model_reloads_bit_for_bit(
    folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for make, folder in folders.items():
        roles = RoleModel(load_base(folder))
        roles.train_base()
        for tensor in roles.trainable_state().values():
            tensor.data.mul_(1.01)
        out = save_policy(roles, "policy", tmp_path / make, tokenizer=tokenizer, base_reference="")
        loaded = AutoModelForCausalLM.from_pretrained(out)
        with torch.no_grad():
            own = roles("policy", lambda m, ids: m(input_ids=ids).logits, token_ids())
            assert torch.equal(loaded(input_ids=token_ids()).logits, own), make
        assert loaded.config.use_cache
        assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
        assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id
        assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
        assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors", ".jinja"}


def test_gathered_state_is_what_is_written(
    folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    roles = trained(folders["llama"], "none")
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in roles.trainable_state().items()}
    out = save_policy(roles, "policy", tmp_path, tokenizer=tokenizer, base_reference="x", state=state)
    written = load_file(out / "adapter_model.safetensors")
    assert written.keys() == state.keys()
    assert all((tensor == 0.5).all() for tensor in written.values())


@pytest.mark.parametrize(("quantization", "tolerance"), [("none", 1e-5), ("nf4", 1e-5), ("int8", 2e-2)])
@pytest.mark.parametrize("make", ["llama", "qwen2"])
def test_merge_computes_what_was_trained(
    folders: dict[str, Path],
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    make: str,
    quantization: str,
    tolerance: float,
) -> None:
    roles = trained(folders[make], quantization, LoraSettings(rank=8, alpha=16, rslora=True))
    adapter = save_policy(roles, "policy", tmp_path, tokenizer=tokenizer, base_reference=str(folders[make]))
    merged = merge_adapter(folders[make], adapter, tmp_path, tokenizer=tokenizer, quantization=quantization)
    child = RoleModel(load_base(merged))
    child.add_base_role("policy")
    expected, found = policy_logits(roles), policy_logits(child)
    assert (found - expected).norm() < tolerance * expected.norm()
    roles.add_base_role("base")
    assert (policy_logits(roles, "base") - expected).norm() > 5e-2 * expected.norm(), "the adapter matters"


def test_folder_and_settings_must_agree(
    folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    roles = trained(folders["llama"], "none")
    out = save_policy(roles, "policy", tmp_path, tokenizer=tokenizer, base_reference="x")
    child = RoleModel(load_base(folders["llama"]))
    child.add_adapter("policy", folder=out, settings=LORA.model_copy(update={"dropout": 0.1}), trainable=True)
    assert all(torch.equal(child.tensors("policy")[n], t) for n, t in roles.tensors("policy").items())
    with pytest.raises(RecipeError, match="has rank 8, the stage wants 4"):
        RoleModel(load_base(folders["llama"])).add_adapter(
            "policy", folder=out, settings=LoraSettings(rank=4, alpha=16), trainable=True
        )
    with pytest.raises(RecipeError, match="the stage wants nothing"):
        RoleModel(load_base(folders["llama"])).add_adapter(
            "policy", folder=out, settings=LoraSettings(rank=8, alpha=16, targets=["q_proj"]), trainable=True
        )


def test_adapter_made_elsewhere_brings_its_own_shape(
    folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    small = LoraSettings(rank=2, alpha=8, targets=["q_proj", "v_proj"])
    made = trained(folders["llama"], "none", small)
    out = save_policy(made, "policy", tmp_path, tokenizer=tokenizer, base_reference="x")
    roles = trained(folders["llama"], "none")
    before = policy_logits(roles)
    roles.add_adapter("reference", folder=out, trainable=False)
    assert torch.equal(policy_logits(roles, "reference"), policy_logits(made))
    assert torch.equal(policy_logits(roles), before)


def test_unfit_adapters_are_refused(
    folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    roles = RoleModel(load_base(folders["llama"]))
    with pytest.raises(RecipeError, match="no LoRA adapter can be read"):
        roles.add_adapter("a", folder=folders["llama"], trainable=False)
    with pytest.raises(RecipeError, match="there is no folder"):
        roles.add_adapter("a", folder=tmp_path / "absent", trainable=False)

    out = save_policy(trained(folders["llama"], "none"), "policy", tmp_path, tokenizer=tokenizer, base_reference="x")
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(RecipeError, match=r"not a plain LoRA adapter \(use_dora"):
        roles.add_adapter("a", folder=out, trainable=False)

    (out / "adapter_config.json").write_text(json.dumps(config))
    torch.save(load_file(out / "adapter_model.safetensors"), out / "adapter_model.bin")
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(RecipeError, match="safetensors"):
        roles.add_adapter("a", folder=out, trainable=False)


def test_adapter_of_another_base_is_refused(
    folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    out = save_policy(trained(folders["llama"], "none"), "policy", tmp_path, tokenizer=tokenizer, base_reference="x")
    weights = load_file(out / "adapter_model.safetensors")
    save_file({n: t for n, t in weights.items() if "layers.1" not in n}, out / "adapter_model.safetensors")
    with pytest.raises(RecipeError, match=r"has nothing for base_model\.model\.model\.layers\.1"):
        RoleModel(load_base(folders["llama"])).add_adapter("a", folder=out, trainable=False)
