"""A small run as the stages leave it: real manifests, a real store, made-up numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from align.artifacts.manifest import Manifest, PolicyRecord, hardware, library_versions
from align.artifacts.store import Store
from align.data import DataReport
from align.evaluation.metrics import Measured, compare_candidates
from align.spec.model import LoraSettings, ModelSettings

HOSTILE = '<script src="https://evil.example/x.js">alert("&amp;")</script><img src=x onerror=alert(1)>'
KOREAN = "별빛 등대는 조용하지만 오래 남는 영화입니다. 배우들의 연기가 훌륭하고 음악도 아름답습니다."

RECIPE = """\
name: quickstart
description: Pretraining, SFT and DPO of a small model in a world whose gold reward is known.
model:
  base: base            # the stage below
  quantization: nf4
  adapter: {kind: lora, rank: 16, alpha: 32, targets: all-linear}
data:
  corpus: {generator: film-reviews, part: corpus, rows: 8000, format: prompt_completion}
  demonstrations: {path: "${env:ALIGN_DATA}/demonstrations.jsonl", format: prompt_completion}
  preferences: {generator: film-reviews, part: preferences, rows: 3000, format: pairs}
  heldout: {generator: film-reviews, part: heldout, rows: 256, format: prompts}
stages:
  base: {kind: pretrain, data: corpus, train: {epochs: 2, learning_rate: 2e-3}}
  sft: {kind: sft, data: demonstrations, train: {epochs: 2, learning_rate: 1e-3}}
  dpo: {kind: dpo, policy: sft, reference: sft, data: preferences, beta: 0.1}
  comparison:
    kind: compare
    candidates: [base, sft, dpo]
    baseline: sft
    prompts: heldout
    scorers: [film-reviews]
    show: 3
"""


versions = cache(library_versions)  # reading every package's metadata takes longer than all the rest


@dataclass
class FakeRun:
    """A run folder whose stages can be left out or damaged one by one.

    Attributes:
        folder: The run folder.
        store: The store that its links point into.
    """

    folder: Path
    store: Store

    def artifact(self, stage: str) -> Path:
        return (self.folder / stage).resolve()

    def status(self, **states: dict[str, Any]) -> None:
        record = {"recipe": "quickstart", "path": "recipe.yaml", "pid": 1, "started": 0.0, "stages": states}
        (self.folder / "status.json").write_text(json.dumps(record))

    def add(self, manifest: Manifest, files: dict[str, Any]) -> None:
        temporary = self.store.temporary(manifest.fingerprint)
        for name, content in files.items():
            lines = name.endswith(".jsonl")
            text = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content)
            (temporary / name).write_text(text)
        artifact = self.store.add(manifest, temporary)
        (self.folder / manifest.stage).symlink_to(artifact.folder, target_is_directory=True)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[[], FakeRun]:
    return lambda: build(tmp_path / "runs" / "quickstart", Store(tmp_path / "home"))


@pytest.fixture
def run(make_run: Callable[[], FakeRun]) -> FakeRun:
    return make_run()


def build(folder: Path, store: Store) -> FakeRun:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    fake = FakeRun(folder, store)
    recipe, rng = yaml.safe_load(RECIPE), np.random.default_rng(0)
    prints = {name: f"{i + 1:x}" * 64 for i, name in enumerate(recipe["stages"])}
    steps = {"base": 500, "sft": 188, "dpo": 187}
    for name, total in steps.items():
        settings = recipe["stages"][name]
        parents = {"base": [], "sft": ["base"], "dpo": ["sft", "base"]}[name]
        data = {settings["data"]: data_report(settings["data"], rng)}
        fake.add(
            manifest(name, settings, prints, parents, total, policy=policy(name, prints["base"]), data=data),
            {"metrics.jsonl": training_lines(name, total, rng), "data.json": data},
        )
    results, samples, scores = comparison(rng)
    settings = recipe["stages"]["comparison"]
    fake.add(
        manifest("comparison", settings, prints, [*steps], 0, policy=None, data={}),
        {"results.json": results, "samples.jsonl": samples, "scores.jsonl": scores},
    )
    fake.status(**{name: {"state": "done", "fingerprint": prints[name], "work": ""} for name in prints})
    return fake


def manifest(
    name: str, settings: dict[str, Any], prints: dict[str, str], parents: list[str], steps: int, **more: Any
) -> Manifest:
    minutes = {"base": 4.2, "sft": 1.4, "dpo": 2.9, "comparison": 0.6}[name]
    return Manifest(
        kind=settings["kind"],
        stage=name,
        recipe="quickstart",
        fingerprint=prints[name],
        inputs={parent: prints[parent] for parent in parents},
        settings=settings,
        seed=0,
        versions=versions(),
        hardware=hardware(),
        wall_seconds=60 * minutes,
        peak_memory_bytes=1_340_000_000,
        steps=steps,
        created=f"2026-03-01T10:0{len(parents)}:00+00:00",
        **more,
    )


def policy(name: str, base: str) -> PolicyRecord:
    if name == "base":
        return PolicyRecord(
            base=base, base_kind="stage", adapter=False, model=ModelSettings(base="base", adapter="none")
        )
    model = ModelSettings(base="base", quantization="nf4", adapter=LoraSettings())
    return PolicyRecord(base=base, base_kind="stage", adapter=True, model=model)


def data_report(name: str, rng: np.random.Generator) -> dict[str, Any]:
    rows = int(rng.integers(1500, 8000))
    quantiles = {"p50": 61, "p90": 82, "p99": 97, "max": 131}
    if name != "demonstrations":
        report = DataReport(rows_read=rows, records=rows, examples=rows, tokens={"total": quantiles})
    else:
        report = DataReport(
            rows_read=rows,
            records=rows - 31,
            examples=rows - 40,
            quarantined={"field 'completion' is empty": 28, "not valid JSON": 3},
            dropped={"no room for a completion": 9},
            noted={"input that says there is none": 147},
            truncated=17,
            tokens={"prompt": quantiles, "completion": quantiles},
        )
    return report.model_dump(mode="json")


def training_lines(name: str, total: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(10, total + 1, 10):
        done = step / total
        rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * done))
        line = {"step": step, "learning_rate": rate, "grad_norm": 0.4 + 0.6 * math.exp(-5 * done) + rng.normal(0, 0.05)}
        if name == "dpo":
            margin = 2.1 * done**0.7 + rng.normal(0, 0.12)
            line |= {
                "loss": math.log1p(math.exp(-margin)),
                "rewards/chosen": 0.4 * margin,
                "rewards/rejected": -0.6 * margin,
                "rewards/margin": margin,
                "rewards/accuracy": min(1.0, 0.55 + 0.3 * done + rng.normal(0, 0.03)),
                "logps/chosen": -41 + 4 * done,
                "logps/rejected": -47 - 6 * done,
            }
        else:
            loss = 0.9 + 4.5 * math.exp(-9 * done) + rng.normal(0, 0.03)
            line |= {"loss": loss, "nll_per_token": loss}
        lines.append(line | {"tokens_per_second": 21_000 + rng.normal(0, 500), "epoch": 2 * done})
        if step % 50 == 0:
            lines.append({"step": step, "eval_loss": line["loss"] * 1.04})
    return lines


def comparison(rng: np.random.Generator) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    n, measured = 256, {}
    ease = rng.normal(0, 0.12, n)
    for name, gold, kl, length, ended in (
        ("base", 0.34, 6.4, 36, 0.82),
        ("sft", 0.52, 0.0, 30, 0.97),
        ("dpo", 0.66, 9.1, 33, 0.99),
    ):
        measured[name] = Measured(
            {"gold": np.clip(gold + ease + rng.normal(0, 0.12, n), 0, 1).tolist()},
            (kl + rng.normal(0, 4, n) * (kl > 0)).tolist(),
            rng.poisson(length, n).tolist(),
            (rng.random(n) < ended).tolist(),
        )
    results = compare_candidates(measured, baseline="sft", confidence=0.95, resamples=500)
    texts = {
        "base": "The film is a story of a film. " * 3,
        "sft": "The Copper Bridge is a good film. The cast is strong and the music is warm.",
        "dpo": "The Copper Bridge is a wonderful film. Its cast shines, the music is tender, and the plot never drags.",
    }
    samples = []
    for i in range(n):
        answers = {
            name: {
                "text": {1: KOREAN, 2: HOSTILE}.get(i, text),
                "scores": {"gold": measured[name].scores["gold"][i]},
                "length": measured[name].length[i],
                "ended": measured[name].ended[i],
            }
            for name, text in texts.items()
        }
        prompts = {1: "‘별빛 등대’를 칭찬하는 평을 써 주세요.", 2: "Review <b>The Copper Bridge</b> & more."}
        prompt = prompts.get(
            i, "Write a positive review of The Copper Bridge. Mention the cast, the music and the plot."
        )
        samples.append({"row": i, "prompt": prompt, "answers": answers})
    scores = [{"row": i, **{name: {"gold": m.scores["gold"][i]} for name, m in measured.items()}} for i in range(n)]
    return results | {"scorers": ["film-reviews"]}, samples, scores
