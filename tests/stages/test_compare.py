"""Comparisons of real, tiny policies out of a real store; the exact KL is known where an answer is one token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from align.artifacts.manifest import Manifest, PolicyRecord
from align.artifacts.store import Artifact, Store
from align.errors import RecipeError, TrainingError
from align.models import RoleModel, load_base, new_base, prepare_process, train_tokenizer
from align.models.save import save_policy
from align.quickstart.world import FilmReviews
from align.recipe.sources import plugins
from align.report.page import write_report
from align.spec.data import GeneratedData
from align.spec.job import Job
from align.spec.model import Architecture, ModelSettings, TokenizerSettings
from align.spec.stages import CompareStage, GenerationSettings
from align.stages import compare
from tests.models.tiny import LORA, randomise

PROMPTS = 24
SCORERS = '''
class Short:
    """Prefers short answers."""

    def score(self, prompt, completion):
        return -len(completion)

class Broken:
    def score(self, prompt, completion):
        return float("nan")
'''


@dataclass
class Shelf:
    """A store with a base, `twin` and `sft` alike, `dpo` far away, and `stranger` with a tokenizer of its own."""

    store: Store
    base: Path
    tokenizer: PreTrainedTokenizerBase
    told: list[tuple[int, int, str]] = field(default_factory=list)
    runs: int = 0

    def __call__(self, candidates: list[str], *, rows: int = PROMPTS, **settings: Any) -> Artifact:
        """Run a comparison against `sft`."""
        generation = GenerationSettings(**{"max_new_tokens": 8, "batch_size": 16} | settings.pop("generation", {}))
        stage = CompareStage(
            candidates=candidates,
            baseline=settings.pop("baseline", "sft"),
            prompts="heldout",
            generation=generation,
            **{"resamples": 300} | settings,
        )
        self.runs += 1
        fingerprint = f"{self.runs:016d}" * 4
        job = Job(
            recipe="tiny",
            stage="best",
            kind="compare",
            settings=stage.model_dump(mode="json"),
            fingerprint=fingerprint,
            inputs={name: name[0] * 64 for name in {*candidates, stage.baseline}},
            data={"heldout": GeneratedData(generator="film-reviews", part="heldout", rows=rows, format="prompts")},
            folder=".",
            work=str(self.store.work(fingerprint)),
            home=str(self.store.home),
        )
        self.told.clear()
        compare.run(job, stage, self.store, lambda *told: self.told.append(told))
        return self.store.get(job.fingerprint)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    prepare_process()
    store = Store(tmp_path_factory.mktemp("home"))
    texts = [row["prompt"] for row in FilmReviews().generate("heldout", 60, 1, {})]
    tokenizer = train_tokenizer(texts, TokenizerSettings(vocab_size=300))
    shape = Architecture(hidden_size=64, intermediate_size=128, layers=2, heads=4, max_positions=256)
    full = ModelSettings(base="base", adapter="none")
    record = PolicyRecord(base="b" * 64, base_kind="stage", adapter=False, model=full)
    for name, own in (("base", tokenizer), ("odd", train_tokenizer(texts[:9], TokenizerSettings(vocab_size=290)))):
        model = new_base(shape, own, seed=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5 if parameter.dim() > 1 else 1)  # far from uniform: answers and KL depend on the policy
        roles = RoleModel(model)
        roles.train_base()
        _add(store, name, roles, own, record, "")
    base = store.get("b" * 64).folder / "model"
    adapted = PolicyRecord(
        base="b" * 64, base_kind="stage", adapter=True, model=ModelSettings(base="base", adapter=LORA)
    )
    for name, seed, strength in (("sft", 1, 1.0), ("twin", 1, 1.0), ("dpo", 2, 4.0)):
        roles = RoleModel(load_base(base))
        roles.add_adapter("policy", settings=LORA, trainable=True, seed=seed)
        randomise(roles, "policy", seed=seed)
        for key, tensor in roles.tensors("policy").items():
            tensor.data.mul_(strength if "lora_B" in key else 1.0)
        _add(store, name, roles, tokenizer, adapted, str(base))
    return Shelf(store, base, tokenizer)


def _add(store: Store, name: str, roles: RoleModel, tokenizer: Any, record: PolicyRecord, base: str) -> None:
    manifest = Manifest(kind="sft", stage=name, recipe="tiny", fingerprint=name[0] * 64, policy=record)
    folder = store.temporary(manifest.fingerprint)
    save_policy(roles, "policy", folder, tokenizer=tokenizer, base_reference=base)
    store.add(manifest, folder)


@pytest.fixture
def house_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "compare_scorers.py").write_text(SCORERS)
    info = tmp_path / "compare_scorers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: compare-scorers\nVersion: 1.0\n")
    entries = "[align.scorers]\nshort = compare_scorers:Short\nbroken = compare_scorers:Broken\n"
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(tmp_path)
    plugins.cache_clear()
    yield
    plugins.cache_clear()


def results(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.folder / "results.json").read_text())


def lines(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (artifact.folder / name).read_text().splitlines()]


def first_logps(shelf: Shelf, name: str, prompts: list[str]) -> torch.Tensor:
    """[N, V] log-probabilities of the first token of an answer, straight from the model."""
    roles = RoleModel(load_base(shelf.base))
    roles.add_adapter("policy", folder=shelf.store.get(name[0] * 64).folder / "adapter", trainable=False)
    rows = []
    for prompt in prompts:
        text = shelf.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = torch.tensor([shelf.tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            rows.append(roles("policy", lambda lm, ids=ids: lm(input_ids=ids).logits[0, -1]).float().log_softmax(-1))
    return torch.stack(rows)


@pytest.mark.usefixtures("house_scorers")
def test_every_candidate_is_measured_in_everything(shelf: Shelf) -> None:
    artifact = shelf(["base", "sft", "dpo"], scorers=["film-reviews", "short"])
    found = results(artifact)
    assert list(found["candidates"]) == ["base", "sft", "dpo"]
    for own in found["candidates"].values():
        assert list(own) == ["gold", "win_rate", "short", "kl", "length", "ended"]
        assert all(interval["n"] == PROMPTS for interval in own.values())
    assert found["scorers"] == ["film-reviews", "short"]
    assert found["baseline"] == "sft"
    assert found["candidates"]["dpo"]["kl"]["mean"] > 1
    assert artifact.manifest.metrics["dpo/kl"] == found["candidates"]["dpo"]["kl"]["mean"]
    assert artifact.manifest.policy is None
    assert set(artifact.manifest.files) >= {"results.json", "samples.jsonl", "scores.jsonl", "data.json"}


@pytest.mark.usefixtures("house_scorers")
def test_the_files_agree_with_each_other(shelf: Shelf) -> None:
    artifact = shelf(["sft", "dpo"], scorers=["short"])
    samples, scores, found = lines(artifact, "samples.jsonl"), lines(artifact, "scores.jsonl"), results(artifact)
    assert len(samples) == len(scores) == PROMPTS
    for name in ("sft", "dpo"):
        for sample, row in zip(samples, scores, strict=True):
            answer = sample["answers"][name]
            assert sample["row"] == row["row"]
            assert answer["scores"]["short"] == row[name]["short"] == -len(answer["text"])
            assert 1 <= answer["length"] == row[name]["length"] <= 8
            assert answer["ended"] == row[name]["ended"]
            assert answer["ended"] or answer["length"] == 8
        for metric in ("short", "kl", "length", "ended"):
            mean = math.fsum(row[name][metric] for row in scores) / PROMPTS
            assert found["candidates"][name][metric]["mean"] == pytest.approx(mean)


def test_the_kl_of_a_one_token_answer_is_the_exact_one(shelf: Shelf) -> None:
    rows = 160
    artifact = shelf(["sft", "dpo"], rows=rows, generation={"max_new_tokens": 1})
    prompts = [sample["prompt"] for sample in lines(artifact, "samples.jsonl")]
    dpo, sft = (first_logps(shelf, name, prompts) for name in ("dpo", "sft"))
    exact = (dpo.exp() * (dpo - sft)).sum(-1)
    variance = (dpo.exp() * (dpo - sft) ** 2).sum(-1) - exact**2
    error = float(variance.sum().sqrt()) / rows  # of the mean of one draw per prompt
    kl = results(artifact)["candidates"]["dpo"]["kl"]
    assert float(exact.mean()) > 4 * error, "far enough from zero to tell the sign and the direction of the ratio"
    assert kl["mean"] == pytest.approx(float(exact.mean()), abs=4 * error)
    assert (kl["high"] - kl["low"]) / 2 == pytest.approx(1.96 * error, rel=0.4)


@pytest.mark.parametrize("generation", [{"temperature": 0.0}, {"temperature": 0.5}, {"top_p": 0.4}], ids=str)
def test_colder_answers_leave_the_kl_as_it_is(shelf: Shelf, generation: dict[str, float]) -> None:
    plain = shelf(["sft", "dpo"])
    cold = shelf(["sft", "dpo"], generation=generation)
    assert results(cold)["candidates"]["dpo"]["kl"] == results(plain)["candidates"]["dpo"]["kl"]
    assert lines(cold, "samples.jsonl") != lines(plain, "samples.jsonl")


@pytest.mark.usefixtures("house_scorers")
def test_equal_policies_tie(shelf: Shelf) -> None:
    artifact = shelf(["sft", "twin"], scorers=["short"])
    found = results(artifact)
    assert found["candidates"]["twin"]["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": PROMPTS}
    assert found["candidates"]["twin"]["kl"]["mean"] == pytest.approx(0.0, abs=1e-4)
    assert found["differences"]["twin"]["length"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": PROMPTS}
    assert all(s["answers"]["sft"] == s["answers"]["twin"] for s in lines(artifact, "samples.jsonl"))


def test_the_same_comparison_again_is_the_same(shelf: Shelf) -> None:
    one, two = shelf(["sft", "dpo"]), shelf(["sft", "dpo"], generation={"batch_size": 5})
    for name in ("samples.jsonl", "data.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    kl = [results(artifact)["candidates"]["dpo"]["kl"]["mean"] for artifact in (one, two)]
    assert kl[0] == pytest.approx(kl[1], abs=1e-4)


def test_without_scorers_there_is_still_a_comparison(shelf: Shelf) -> None:
    found = results(shelf(["sft", "dpo"]))
    assert list(found["candidates"]["dpo"]) == ["kl", "length", "ended"]
    assert found["scorers"] == []


def test_progress_reaches_its_end(shelf: Shelf) -> None:
    shelf(["sft", "dpo"], generation={"temperature": 0.7})
    steps = [(step, total) for step, total, _ in shelf.told if total]
    assert steps == sorted(steps)
    assert steps[-1] == (6, 6)
    assert shelf.told[0] == (0, 0, "reading prompts")


@pytest.mark.usefixtures("house_scorers")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s(["sft"], scorers=["broken"]), TrainingError, r"scorer `broken` returned nan for .* row 0"),
        (lambda s: s(["sft"], scorers=["shrt"]), RecipeError, r"no scorer is called `shrt`; did you mean `short`"),
        (lambda s: s(["sft", "odd"]), RecipeError, r"`odd` and the baseline `sft` have different tokenizers"),
        (lambda s: s(["sft"], generation={"max_new_tokens": 256}), RecipeError, r"leave no room for a prompt"),
    ],
    ids=["bad score", "unknown scorer", "other tokenizer", "no room"],
)
def test_what_cannot_be_compared_is_told(
    shelf: Shelf, call: Callable[[Shelf], Artifact], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(shelf)
    assert shelf.store.find(f"{shelf.runs:016d}" * 4) is None
    assert not list((shelf.store.home / "artifacts").glob(".*"))


def test_the_report_shows_a_real_comparison(shelf: Shelf, tmp_path: Path) -> None:
    artifact = shelf(["sft", "dpo"], scorers=["film-reviews"])
    (tmp_path / "best").symlink_to(artifact.folder, target_is_directory=True)
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    for part in ("gold", "win rate", "KL (nats)", f"{PROMPTS} held-out prompts", "the first 6 of 24 prompts"):
        assert part in page
