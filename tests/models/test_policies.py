"""Artifacts of a real store, loaded back: shared bases, cards, and what is no policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from align.artifacts.manifest import Manifest, PolicyRecord, hardware, library_versions
from align.artifacts.store import Store
from align.errors import ArtifactError
from align.models import RoleModel, load_base, new_base
from align.models.card import write_card
from align.models.policies import load_policies, load_policy_tokenizer, locate
from align.models.save import merge_adapter, save_policy
from align.spec.model import Architecture, ModelSettings
from tests.models.tiny import LORA, logits, randomise, token_ids

Expected = dict[str, torch.Tensor]


def manifest(name: str, policy: PolicyRecord | None) -> Manifest:
    return Manifest(
        kind="sft",
        stage=name,
        recipe="tiny",
        fingerprint=name * 8,
        inputs={"base": "base" * 8},
        data={"reviews": {"rows_read": 120, "examples": 117, "dropped": {"empty": 3}}},
        settings={"kind": "sft", "train": {"learning_rate": 1e-4}, "note": "a | b"},
        policy=policy,
        seed=7,
        versions=library_versions(),
        hardware=hardware(),
        metrics={"loss": 1.23456789},
        wall_seconds=90.0,
        peak_memory_bytes=2**30,
        steps=12,
        created="2026-01-01T00:00:00+00:00",
    )


def add(store: Store, name: str, policy: PolicyRecord | None, roles: RoleModel | None, base: str, tokenizer) -> str:
    entry = manifest(name, policy)
    folder = store.temporary(entry.fingerprint)
    if roles is not None:
        save_policy(roles, "policy", folder, tokenizer=tokenizer, base_reference=base)
        write_card(folder, entry)
    else:
        (folder / "results.json").write_text("{}")
    store.add(entry, folder)
    return entry.fingerprint


def trained(base: str, quantization: str, seed: int) -> RoleModel:
    roles = RoleModel(load_base(base, quantization=quantization))
    roles.add_adapter("policy", settings=LORA, trainable=True, seed=seed)
    randomise(roles, "policy", seed=seed)
    return roles


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> tuple[Store, Expected]:
    """A base trained in full, two adapters on it, one of them on its NF4 form, and a comparison."""
    store = Store(tmp_path_factory.mktemp("home"))
    whole = RoleModel(new_base(Architecture(hidden_size=64, intermediate_size=128, layers=2), tokenizer, seed=0))
    whole.train_base()
    full = ModelSettings(base="base", adapter="none")
    policy = PolicyRecord(base="base" * 8, base_kind="stage", adapter=False, model=full)
    add(store, "base", policy, whole, "", tokenizer)
    base = str(store.get("base" * 8).folder / "model")

    found = {"base": whole}
    for seed, (name, quantization) in enumerate({"one": "none", "two": "none", "four": "nf4"}.items()):
        found[name] = trained(base, quantization, seed)
        model = ModelSettings(base="base", quantization=quantization, adapter=LORA)
        policy = PolicyRecord(base="base" * 8, base_kind="stage", adapter=True, model=model)
        add(store, name, policy, found[name], base, tokenizer)
    add(store, "table", None, None, "", tokenizer)
    with torch.no_grad():
        return store, {name: roles("policy", logits, token_ids()) for name, roles in found.items()}


def test_policies_of_one_base_share_it(shelf: tuple[Store, Expected]) -> None:
    store, expected = shelf
    found = load_policies(store, {name: name * 8 for name in expected})
    assert found["base"] is found["one"] is found["two"]
    assert found["four"] is not found["one"], "its base is quantised"
    assert not any(parameter.requires_grad for roles in found.values() for parameter in roles.parameters())
    with torch.no_grad():
        for name, roles in found.items():
            assert torch.equal(roles(name, logits, token_ids()), expected[name]), name


def test_a_policy_brings_its_tokenizer(shelf: tuple[Store, Expected], tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("base", "one"):
        assert load_policy_tokenizer(shelf[0], name * 8).get_vocab() == tokenizer.get_vocab()


def test_what_is_no_policy_is_told(shelf: tuple[Store, Expected]) -> None:
    with pytest.raises(ArtifactError, match=r"'table' \(sft\) made no policy"):
        locate(shelf[0], "table" * 8)
    with pytest.raises(ArtifactError):
        load_policies(shelf[0], {"policy": "absent" * 8})


def test_a_merged_parent_is_a_base_of_its_own(
    shelf: tuple[Store, Expected], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The child's artifact holds the merged base as `model/` and its own adapter as `adapter/`."""
    store, expected = shelf
    parent = locate(store, "four" * 8)
    entry = manifest(
        "child",
        PolicyRecord(base="child" * 8, base_kind="stage", adapter=True, model=ModelSettings(base="base", adapter=LORA)),
    )
    folder = store.temporary(entry.fingerprint)
    merged = merge_adapter(parent.base, parent.folder, folder, tokenizer=tokenizer, quantization="nf4")
    roles = RoleModel(load_base(merged))
    roles.add_adapter("policy", settings=LORA, trainable=True)
    save_policy(roles, "policy", folder, tokenizer=tokenizer, base_reference="model")
    store.add(entry, folder)
    child = load_policies(store, {"policy": "child" * 8})["policy"]
    with torch.no_grad():
        torch.testing.assert_close(child("policy", logits, token_ids()), expected["four"], rtol=1e-4, atol=1e-5)


def test_card_holds_the_facts(shelf: tuple[Store, Expected], tmp_path: Path) -> None:
    card = (shelf[0].get("four" * 8).folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["align", "sft", "lora", "nf4"],
    }
    for fact in (
        "stage `basebasebasebase`",
        "12 optimizer steps in 1.5 minutes, seed 7, at most 1.00 GiB",
        "| reviews | dropped.empty | 3 |",
        "learning_rate: 0.0001",
        "| loss | 1.23457 |",
        f"| torch | {torch.__version__.split('+')[0]}",
        "load_in_4bit=True",
        "## Licence\n\nNot recorded.",
    ):
        assert fact in body, fact

    policy = PolicyRecord(
        base="org/base", base_kind="hub", revision="abc", adapter=False, model=ModelSettings(base="org/base")
    )
    write_card(tmp_path, manifest("full", policy))
    front, body = (tmp_path / "README.md").read_text().split("---\n", 2)[1:]
    assert yaml.safe_load(front)["base_model"] == "org/base"
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "all parameters trained on `org/base` at revision `abc`" in body
    assert 'AutoModelForCausalLM.from_pretrained("model")' in body


def test_the_cards_code_loads_the_policy(shelf: tuple[Store, Expected], monkeypatch: pytest.MonkeyPatch) -> None:
    store, expected = shelf
    for name in ("base", "one", "four"):
        folder = store.get(name * 8).folder
        monkeypatch.chdir(folder)
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        scope: dict = {}
        exec(code, scope)
        with torch.no_grad():
            torch.testing.assert_close(scope["model"](input_ids=token_ids()).logits, expected[name])
