"""Reward stages on a real store: from an SFT policy, from a base, from somebody else's reward model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.artifacts.manifest import Manifest, PolicyRecord
from align.artifacts.store import Artifact, Store
from align.data import Example, load_examples, split_validation
from align.errors import RecipeError
from align.methods.reward import Reward
from align.models import RoleModel, load_base, new_base, prepare_process, train_tokenizer
from align.models.base import quantization_config
from align.models.rewards import load_reward
from align.models.save import save_policy
from align.quickstart.world import FilmReviews
from align.spec.data import GeneratedData
from align.spec.job import Job
from align.spec.model import Architecture, ModelSettings, TokenizerSettings
from align.stages import reward as reward_stage
from align.stages import train
from align.training.rewards import completion_rewards
from align.types import Batch
from tests.models.tiny import LORA, randomise

PREFERENCES = GeneratedData(generator="film-reviews", part="preferences", rows=40, format="pairs")
BASE, SFT = "b" * 64, "s" * 64


@dataclass
class Workshop:
    """A store with a base and an SFT policy on its NF4 form, and a stage that trains reward models."""

    store: Store
    base: Path
    runs: int = 0

    def job(self, model: ModelSettings, **settings: Any) -> tuple[Job, Reward]:
        common = {"max_steps": 6, "global_batch_size": 8, "learning_rate": 5e-3, "max_tokens": 200, "pack_tokens": 2000}
        stage = Reward(data="preferences", train=common | settings.pop("train", {}), **settings)
        self.runs += 1
        fingerprint = f"{self.runs:016d}" * 4
        return Job(
            recipe="tiny",
            stage="rm",
            kind="reward",
            settings=stage.model_dump(mode="json"),
            model=model,
            fingerprint=fingerprint,
            inputs={"sft": SFT} if stage.policy == "sft" else {},
            data={"preferences": PREFERENCES},
            folder=".",
            work=str(self.store.work(fingerprint)),
            home=str(self.store.home),
        ), stage

    def __call__(self, model: ModelSettings, **settings: Any) -> Artifact:
        job, stage = self.job(model, **settings)
        train.run(job, stage, self.store, lambda *told: None)
        return self.store.get(job.fingerprint)

    def examples(self, artifact: Artifact) -> tuple[list[Example], list[Example]]:
        """What the stage trained on, and what it held out."""
        settings = Reward.model_validate(artifact.manifest.settings)
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        found, _ = load_examples(
            PREFERENCES, batch=Batch.RANKED, tokenizer=tokenizer, max_tokens=200, loss_on="completion",
            folder=Path(), quarantine=None,
        )  # fmt: skip
        if settings.train.validation is None:
            return found, []
        return split_validation(found, settings.train.validation.fraction, settings.train.seed)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    prepare_process()
    store = Store(tmp_path_factory.mktemp("home"))
    texts = [row["prompt"] for row in FilmReviews().generate("heldout", 60, 1, {})]
    tokenizer = train_tokenizer(texts, TokenizerSettings(vocab_size=300))
    shape = Architecture(hidden_size=64, intermediate_size=128, layers=2, heads=4, max_positions=256)
    whole = RoleModel(new_base(shape, tokenizer, seed=0))
    whole.train_base()
    for parameter in whole.parameters():
        parameter.data.mul_(5 if parameter.dim() > 1 else 1)
    record = PolicyRecord(base=BASE, base_kind="stage", adapter=False, model=ModelSettings(base="b", adapter="none"))
    _add(store, BASE, whole, tokenizer, record, "")
    base = store.get(BASE).folder / "model"
    sft = RoleModel(load_base(base, quantization="nf4"))
    sft.add_adapter("policy", settings=LORA, trainable=True, seed=1)
    randomise(sft, "policy", seed=1)
    record = PolicyRecord(base=BASE, base_kind="stage", adapter=True, model=nf4(base))
    _add(store, SFT, sft, tokenizer, record, str(base))
    return Workshop(store, base)


def _add(store: Store, fingerprint: str, roles: RoleModel, tokenizer: Any, record: PolicyRecord, base: str) -> None:
    folder = store.temporary(fingerprint)
    save_policy(roles, "policy", folder, tokenizer=tokenizer, base_reference=base)
    store.add(Manifest(kind="sft", stage="x", recipe="tiny", fingerprint=fingerprint, policy=record), folder)


def nf4(base: Path | str) -> ModelSettings:
    return ModelSettings(base=str(base), quantization="nf4", adapter=LORA)


def content(artifact: Artifact, name: str) -> dict[str, Any]:
    return json.loads((artifact.folder / name).read_text())


@torch.no_grad()
def transformers_scores(model: Any, pad: int, examples: list[Example]) -> list[tuple[float, ...]]:
    """One padded batch of all completions, in transformers' own way."""
    rows = [e.prompt_ids + c.ids for e in examples for c in e.completions]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    scores = model.eval()(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    return [tuple(scores[i : i + 2]) for i in range(0, len(scores), 2)]


@pytest.fixture(scope="module")
def from_sft(workshop: Workshop) -> Artifact:
    """A reward model on the NF4 base that goes on from the SFT adapter, judged on held-out pairs."""
    validation = {"fraction": 0.25, "every_steps": 3}
    return workshop(nf4(workshop.base), policy="sft", train={"max_steps": 25, "validation": validation})


def test_it_goes_on_from_the_policys_adapter(workshop: Workshop, from_sft: Artifact) -> None:
    job, stage = workshop.job(nf4(workshop.base), policy="sft")
    opened = train._open(job, stage, workshop.store, None)
    assert opened.roles.trained_role == "reward"
    parent = RoleModel(load_base(workshop.base, quantization="nf4"))
    parent.add_adapter("policy", folder=workshop.store.get(SFT).folder / "adapter", trainable=False)
    own = opened.roles.tensors("reward")
    head = own.pop("base_model.model.score.weight")
    assert all(torch.equal(own[name], tensor) for name, tensor in parent.tensors("policy").items())
    again = train._open(job, stage, workshop.store, None).roles.head("reward").weight
    assert torch.equal(head, again)
    record = from_sft.manifest.reward
    assert record is not None
    assert (record.base, record.base_kind, record.adapter) == (BASE, "stage", True)
    assert from_sft.manifest.policy is None
    assert workshop.store._bases(from_sft.folder.name), "garbage collection keeps what it stands on"


def test_the_evaluation_is_that_of_the_held_out_pairs(workshop: Workshop, from_sft: Artifact) -> None:
    trained, held_out = workshop.examples(from_sft)
    peft = AutoPeftModelForSequenceClassification.from_pretrained(
        str(from_sft.folder / "adapter"), num_labels=1, dtype=torch.float32,
        quantization_config=quantization_config("nf4", torch.float32),
    )  # fmt: skip
    pad = AutoTokenizer.from_pretrained(from_sft.folder / "adapter").pad_token_id
    theirs = transformers_scores(peft, pad, held_out)
    found = content(from_sft, "evaluation.json")
    assert found["on"] == "held-out"
    assert found["pairs"] == len(held_out) == 10
    assert found["accuracy"]["mean"] == np.mean([chosen > rejected for chosen, rejected in theirs])
    assert found["margin"]["mean"] == pytest.approx(np.mean([c - r for c, r in theirs]), abs=1e-4)
    assert sum(b["n"] for b in found["calibration"]["bins"]) == len(held_out)
    metrics = from_sft.manifest.metrics
    assert metrics["evaluation/accuracy"] == found["accuracy"]["mean"]
    assert metrics["evaluation/accuracy"] == pytest.approx(metrics["eval_rewards/accuracy"]), "the trainer's own"

    normalization = content(from_sft, "normalization.json")
    scores = [s for row in transformers_scores(peft, pad, trained) for s in row]
    assert (normalization["n"], normalization["on"]) == (2 * len(trained), "data")
    assert normalization["mean"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert normalization["std"] == pytest.approx(np.std(scores), rel=1e-3)

    model, scale = load_reward(workshop.store, from_sft.manifest.fingerprint)
    ours = np.array(completion_rewards(model, "reward", held_out, 2000))
    np.testing.assert_allclose(ours, (np.array(theirs) - scale.mean) / scale.std, atol=1e-4)
    normalised = np.array(completion_rewards(model, "reward", trained, 2000))
    assert abs(normalised.mean()) < 1e-4
    assert normalised.std() == pytest.approx(1.0, abs=1e-3)


def test_samples_of_the_start_are_the_scale(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "policy": "sft", "normalise": "samples", "normalise_prompts": 5, "generation": {"max_new_tokens": 6, "seed": 3},
    }  # fmt: skip
    artifact = workshop(nf4(workshop.base), **settings)
    found = content(artifact, "normalization.json")
    assert (found["n"], found["on"]) == (5, "samples")
    assert content(artifact, "evaluation.json")["on"] == "training", "nothing was held out"
    job, stage = workshop.job(nf4(workshop.base), **settings)
    examples, _ = workshop.examples(artifact)
    tokenizer = AutoTokenizer.from_pretrained(workshop.base)
    drawn = reward_stage.draw_samples(job, stage, workshop.store, examples, tokenizer, lambda *told: None)
    assert len({tuple(e.prompt_ids) for e in drawn}) == 5
    assert all(1 <= len(e.completions[0].ids) <= 6 for e in drawn)
    model, _ = load_reward(workshop.store, artifact.manifest.fingerprint)
    normalised = np.array(completion_rewards(model, "reward", drawn, 2000))
    assert abs(normalised.mean()) < 1e-4
    assert normalised.std() == pytest.approx(1.0, abs=1e-3)
    # A run that goes on does not draw again.
    monkeypatch.setattr(reward_stage, "generate", None)
    again = reward_stage.draw_samples(job, stage, workshop.store, examples, tokenizer, lambda *told: None)
    assert again == drawn


def test_a_reward_model_trained_in_full(workshop: Workshop) -> None:
    """With the weights of its best validation, and no scale."""
    artifact = workshop(
        ModelSettings(base=str(workshop.base), adapter="none"),
        normalise="none",
        train={
            "max_steps": 12,
            "learning_rate": 0.02,
            "validation": {"fraction": 0.25, "every_steps": 2, "keep": "best"},
        },
    )
    best = min(
        (line for line in map(json.loads, (artifact.folder / "metrics.jsonl").open()) if "eval_loss" in line),
        key=lambda line: line["eval_loss"],
    )
    assert best["step"] < 12, "the last weights are others"
    loaded = AutoModelForSequenceClassification.from_pretrained(artifact.folder / "model")
    _, held_out = workshop.examples(artifact)
    theirs = transformers_scores(loaded, loaded.config.pad_token_id, held_out)
    found = content(artifact, "evaluation.json")
    assert found["margin"]["mean"] == pytest.approx(np.mean([c - r for c, r in theirs]), abs=1e-4)
    assert found["margin"]["mean"] == pytest.approx(best["eval_rewards/margin"], abs=1e-4)
    assert content(artifact, "normalization.json") == {"mean": 0.0, "std": 1.0, "n": 0, "on": "none"}
    record = artifact.manifest.reward
    assert record is not None
    assert (record.base, record.adapter) == (artifact.manifest.fingerprint, False)


def test_it_goes_on_from_somebody_elses_reward_model(workshop: Workshop, tmp_path: Path) -> None:
    torch.manual_seed(7)
    theirs = AutoModelForSequenceClassification.from_pretrained(workshop.base, num_labels=1)
    theirs.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(workshop.base).save_pretrained(tmp_path / "theirs")
    model = ModelSettings(base=str(tmp_path / "theirs"), adapter=LORA)
    job, stage = workshop.job(model)
    opened = train._open(job, stage, workshop.store, None)
    assert torch.equal(opened.roles.head("reward").weight, theirs.score.weight)
    artifact = workshop(model, train={"max_steps": 2})
    trained, _ = workshop.examples(artifact)
    peft = AutoPeftModelForSequenceClassification.from_pretrained(str(artifact.folder / "adapter"), num_labels=1)
    found, scale = load_reward(workshop.store, artifact.manifest.fingerprint)
    ours = np.array(completion_rewards(found, "reward", trained[:5], 2000)) * scale.std + scale.mean
    np.testing.assert_allclose(ours, transformers_scores(peft, peft.config.pad_token_id or 1, trained[:5]), atol=1e-4)
    with pytest.raises(RecipeError, match="is a reward model: it writes nothing"):
        workshop(model, normalise="samples")


def test_the_scale_of_the_vectors() -> None:
    """Gain and bias of arXiv:1909.08593 on known rewards."""
    vectors = json.loads((Path(__file__).parents[1] / "methods" / "vectors.json").read_text())
    raw, expected = (vectors["reward_normalisation"][part] for part in ("inputs", "expected"))
    scale = reward_stage._normalization(raw["raw_rewards"], Reward(data="pairs"))
    assert 1 / scale.std == pytest.approx(expected["gain"], abs=1.5e-6)
    assert -scale.mean / scale.std == pytest.approx(expected["bias"], abs=1.5e-6)
    scaled = [(r - scale.mean) / scale.std for r in raw["raw_rewards"]]
    assert scaled == pytest.approx(expected["normalised"], abs=1.5e-6)
