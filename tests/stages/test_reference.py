"""Which policy a stage's reference is: every ingredient of its key, taken from real folders and a real store."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.artifacts import reference as keys
from align.artifacts.manifest import Manifest, PolicyRecord
from align.artifacts.store import Store
from align.errors import LaunchError, RecipeError
from align.models import load_base, load_tokenizer
from align.models.roles import RoleModel
from align.models.save import ADAPTER, MODEL, merge_adapter, save_policy
from align.spec.job import Job
from align.spec.model import LoraSettings, ModelSettings
from align.stages import reference as module
from align.stages import start
from align.stages.peer.policy import PeerPolicy
from align.stages.reference import find_references, policy_key, read_second_copy
from tests.models.tiny import randomise
from tests.training.worlds import random_examples, save_tiny_base

SFT, FULL, DPO = "5" * 64, "f" * 64, "d" * 64
LORA = LoraSettings(rank=4, alpha=8)
SETS = {"train": random_examples(6, 2), "validation": random_examples(2, 2, seed=1)}
ROWS = 16


@dataclass
class World:
    """A base in a folder, a stage that trained an adapter on it, one that trained it in full, and a DPO on them."""

    folder: Path
    store: Store
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def train_adapter(self, seed: int = 1) -> None:
        roles = RoleModel(load_base(self.base))
        roles.add_adapter("policy", settings=LORA, trainable=True)
        randomise(roles, "policy", seed)
        self._publish(roles, SFT, PolicyRecord(base=str(self.base), base_kind="path", adapter=True, model=self._model))

    def train_in_full(self) -> None:
        roles = RoleModel(load_base(self.base))
        roles.train_base()
        with torch.no_grad():
            roles.causal_lm.lm_head.weight.mul_(1.5)
        self._publish(roles, FULL, PolicyRecord(base=FULL, base_kind="stage", adapter=False, model=self._model))

    def _publish(self, roles: RoleModel, fingerprint: str, record: PolicyRecord) -> None:
        self.store.discard(fingerprint)
        folder = self.store.temporary(fingerprint)
        save_policy(
            roles, "policy", folder, tokenizer=load_tokenizer(self.base), base_reference=str(self.base.resolve())
        )
        self.store.add(Manifest(kind="sft", stage="s", recipe="r", fingerprint=fingerprint, policy=record), folder)

    @property
    def _model(self) -> ModelSettings:
        return ModelSettings(
            **({"base": str(self.base), "adapter": LORA.model_dump(), "dtype": "float32"} | self.model)
        )

    @property
    def job(self) -> Job:
        settings = {"kind": "dpo", "data": "pairs", "policy": "sft", "reference": "sft", "train": {}} | self.settings
        return Job(
            recipe="r", stage="dpo", kind="dpo", settings=settings, model=self._model, fingerprint=DPO,
            inputs={"sft": SFT, "full": FULL}, folder=str(self.folder), work=str(self.folder / "work"),
            home=str(self.store.home), launch=self.launch,
            data={"pairs": {"generator": "film-reviews", "part": "preferences", "rows": 8, "format": "pairs"}},
        )  # fmt: skip

    @property
    def parsed(self):
        from align.methods.dpo import DPO as Settings

        return Settings.model_validate(self.job.settings)

    def begin(self) -> start.Start:
        return start.of_policy(self.job, self.parsed, self.store)

    def key(self, begin: start.Start | None = None) -> str:
        """The folder of the rows that the stage asks for."""
        references = find_references(self.job, self.parsed, self.store, begin or self.begin(), SETS)
        assert references is not None
        return references.cache.folder.name


@pytest.fixture
def world(tmp_path: Path, align_home: Path) -> World:
    made = World(tmp_path, Store())
    save_tiny_base(made.base)
    made.train_adapter()
    return made


def flip(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def one_weight(world: World) -> None:
    path = world.base / "model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    tensors[first].view(-1)[0] += 1e-6
    save_file(tensors, path, metadata={"format": "pt"})


def config(world: World) -> None:
    path = world.base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))


def byte_of_the_adapter(world: World) -> None:
    """The same fingerprint, trained elsewhere: its files differ in one byte."""
    folder, artifact = world.store.temporary(SFT), world.store.get(SFT)
    (folder / ADAPTER).mkdir()
    for path in (artifact.folder / ADAPTER).iterdir():
        (folder / ADAPTER / path.name).write_bytes(path.read_bytes())
    flip(folder / ADAPTER / "adapter_model.safetensors")
    world.store.discard(SFT)
    world.store.add(artifact.manifest, folder)


def scale_of_the_adapter(world: World) -> None:
    folder, artifact = world.store.temporary(SFT), world.store.get(SFT)
    (folder / ADAPTER).mkdir()
    for path in (artifact.folder / ADAPTER).iterdir():
        (folder / ADAPTER / path.name).write_bytes(path.read_bytes().replace(b'"lora_alpha": 8', b'"lora_alpha": 9'))
    world.store.discard(SFT)
    world.store.add(artifact.manifest, folder)


def template(world: World) -> None:
    (world.base / "chat_template.jinja").write_text((world.base / "chat_template.jinja").read_text() + " ")


def dtype(world: World) -> None:
    world.model["dtype"] = "bfloat16"


def quantization(world: World) -> None:
    world.model["quantization"] = "nf4"


MUTATIONS = [one_weight, config, byte_of_the_adapter, scale_of_the_adapter, template, dtype, quantization]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.__name__)
def test_a_changed_ingredient_is_another_policy(mutation, world: World) -> None:
    before = world.key()
    mutation(world)
    assert world.key() != before


def test_another_engine_is_another_policy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = world.key()
    monkeypatch.setattr(keys, "ENGINE", keys.ENGINE + 1)
    assert world.key() != before


def test_nothing_else_is(world: World) -> None:
    """Settings of the method, of training and of the launch; the place of the base; a README."""
    before = world.key()
    (world.base / "README.md").write_text("new")
    world.settings |= {"beta": 0.5, "train": {"seed": 7, "pack_tokens": 99, "max_tokens": 12}}
    world.model["gradient_checkpointing"] = True
    world.launch |= {"deepspeed": "zero2", "processes": 2}
    assert world.key() == before


def test_a_retrained_stage_with_the_same_bits_is_the_same_policy(world: World) -> None:
    before = world.key()
    world.train_adapter()
    assert world.key() == before
    world.train_adapter(seed=2)
    assert world.key() != before


def test_the_base_itself_is_not_the_adapter_on_it(world: World) -> None:
    world.train_in_full()
    world.settings["reference"] = "full"
    full = world.key()
    world.settings["reference"] = "sft"
    assert world.key() != full


@pytest.mark.parametrize(
    ("dtype", "deepspeed", "trained", "expected"),
    [
        ("float32", "none", True, "float32"),
        ("float32", "zero2", True, "float32"),
        ("bfloat16", "none", True, "bfloat16 on float32"),
        ("bfloat16", "zero2", True, "bfloat16"),
        ("bfloat16", "none", False, "bfloat16"),
    ],
)
def test_what_is_computed_in(dtype: str, deepspeed: str, trained: bool, expected: str, world: World) -> None:
    world.model["dtype"], world.launch["deepspeed"] = dtype, deepspeed
    assert module.computed_in(world.job, trained=trained) == expected


def test_a_merged_parent_is_told_by_the_merged_base(world: World) -> None:
    """With merge_parent the reference is the new base, wherever it was made."""
    own = world.key()
    world.model["merge_parent"] = True
    found = []
    for name in ("one", "two"):
        adapter = world.store.get(SFT).folder / ADAPTER
        merge_adapter(world.base, adapter, world.folder / name, tokenizer=load_tokenizer(world.base), dtype="float32")
        found.append(world.key(start.Start(str(world.folder / name / MODEL), DPO, "stage")))
    assert found[0] == found[1] != own


def test_a_hub_name_stands_at_its_commit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.recipe.digest import Digests

    cache = world.folder / "hub"
    (cache / "models--someone--base" / "refs").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    hub = start.Start("someone/base", "someone/base", "hub")

    def base_of(begin: start.Start) -> str:
        return policy_key(world.job, begin, begin, Digests(world.store.home)).base

    with pytest.raises(LaunchError, match="neither the Hub nor the local cache could be asked for someone/base@main"):
        base_of(hub)
    for commit in ("a" * 40, "b" * 40):
        (cache / "models--someone--base" / "refs" / "main").write_text(commit)
        assert base_of(hub) == f"someone/base@{commit}"
    assert base_of(replace(hub, revision="c" * 40)) == f"someone/base@{'c' * 40}"


# --- what is read and computed -----------------------------------------------------------------------------------


def test_a_stage_without_a_reference_asks_for_nothing(world: World) -> None:
    from align.methods.sft import SFT as Settings

    settings = Settings(data="pairs", policy="sft")
    assert find_references(world.job, settings, world.store, world.begin(), SETS) is None
    assert read_second_copy(world.job, settings, world.store, SETS) is None
    assert not world.store.references.folder.exists()


def test_what_a_stage_took_the_next_one_finds(world: World) -> None:
    first = find_references(world.job, world.parsed, world.store, world.begin(), SETS)
    assert first is not None
    assert len(first.missing) == ROWS
    roles = RoleModel(load_base(world.base))
    roles.add_adapter("reference", folder=world.begin().adapter, trainable=False)
    first.compute(roles, "reference", pack_tokens=99)
    world.settings |= {"beta": 0.7}
    second = find_references(world.job, world.parsed, world.store, world.begin(), SETS)
    assert second is not None
    assert (second.missing, second.cost.reused) == (set(), ROWS)
    assert list(world.store.references.complete(SFT).values()) == [ROWS]


def test_a_second_copy_is_loaded_once_and_never_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained in full against another stage: what the store has needs no copy of that stage in memory."""
    world.train_in_full()
    world.model["adapter"] = "none"
    world.settings |= {"policy": None, "reference": "full"}
    loaded = []
    monkeypatch.setattr(module, "load_base", lambda *a, **o: loaded.append(a) or load_base(*a, **o))
    first = read_second_copy(world.job, world.parsed, world.store, SETS)
    second = read_second_copy(world.job, world.parsed, world.store, SETS)
    assert first is not None
    assert second is not None
    assert (first.cost.computed, second.cost.computed) == (ROWS, 0)
    assert first.totals("train") == second.totals("train")
    assert len(loaded) == 1
    roles = RoleModel(load_base(world.store.get(FULL).folder / MODEL))
    roles.add_base_role("reference")
    from align.logps import completion_logps

    expected = completion_logps(roles, "reference", SETS["train"], 999)
    assert [v for row in first.totals("train") for v in row] == pytest.approx(
        [v for row in expected for v in row], abs=2e-4
    )


def dynamic(folder: Path) -> None:
    """Positions whose frequencies follow the longest sequence of a batch, beyond 128."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": rope}))


def test_a_second_copy_that_would_depend_on_neighbours_is_refused(world: World) -> None:
    dynamic(world.base)
    world.train_in_full()
    world.model["adapter"] = "none"
    world.settings |= {"policy": None, "reference": "full", "train": {"max_tokens": 129}}
    with pytest.raises(
        RecipeError, match="129 is more than the 128 positions that the reference `full` was first made"
    ):
        read_second_copy(world.job, world.parsed, world.store, SETS)
    world.settings["train"] = {"max_tokens": 128}
    assert read_second_copy(world.job, world.parsed, world.store, SETS) is not None


@pytest.mark.parametrize("adapter", [LORA.model_dump(), "none"], ids=["lora", "full"])
def test_the_peer_refuses_them_too(world: World, adapter: Any) -> None:
    """What it trains, and what it reads beside that."""
    path = world.base / "config.json"
    plain = path.read_text()
    dynamic(world.base)
    who = "model"
    if adapter == "none":
        world.train_in_full()
        path.write_text(plain)
        who = "reference"
    world.model["adapter"] = adapter
    world.settings |= {"policy": None, "reference": "full" if adapter == "none" else "sft"}
    world.settings["train"] = {"max_tokens": 129}
    with pytest.raises(RecipeError, match=f"129 is more than the 128 positions that the {who} was first made for"):
        PeerPolicy(world.job, world.parsed, world.begin()).reference_model(world.store)
    world.settings["train"] = {"max_tokens": 128}
    PeerPolicy(world.job, world.parsed, world.begin()).reference_model(world.store)


def test_a_policy_that_is_its_own_reference_needs_no_copy(world: World) -> None:
    world.train_in_full()
    world.model["adapter"] = "none"
    world.settings |= {"policy": "full", "reference": "full"}
    assert read_second_copy(world.job, world.parsed, world.store, SETS) is None
    references = find_references(world.job, world.parsed, world.store, world.begin(), SETS)
    assert references is not None
    assert len(references.missing) == ROWS
