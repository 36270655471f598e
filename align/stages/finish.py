"""The end of a training stage: its model, its numbers and its manifest become an artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from align.artifacts.manifest import PolicyRecord
from align.artifacts.store import Store
from align.data import DataReport
from align.models.card import write_card
from align.models.roles import RoleModel
from align.models.save import MODEL, save_policy
from align.recipe.packing import PackingChoice
from align.spec.job import Job
from align.spec.stages import TrainedStage
from align.stages.publish import manifest_of
from align.stages.reward import Judgement
from align.stages.start import Start


def publish_policy(
    job: Job,
    settings: TrainedStage,
    store: Store,
    *,
    roles: RoleModel,
    begin: Start,
    record: PolicyRecord,
    tokenizer: Any,
    state: Mapping[str, Tensor],
    steps: int,
    packing: PackingChoice | None,
    reports: Mapping[str, DataReport],
    judgement: Judgement | None = None,
    seconds: float,
) -> None:
    """Write the artifact of a trained stage; called on rank 0 with the trained tensors gathered.

    Args:
        job: The stage.
        settings: Its settings, parsed.
        store: Where the artifact goes.
        roles: The model that was trained.
        begin: Where the model started; a merged base is taken along.
        record: What the manifest says of the model.
        tokenizer: Saved beside the weights.
        state: The trained tensors, whole.
        steps: Optimizer steps that were taken.
        packing: How log-probabilities were computed.
        reports: Data name -> what was read, dropped and quarantined.
        judgement: What became of a reward model.
        seconds: Wall time of the stage in this process.
    """
    work, folder = Path(job.work), store.temporary(job.fingerprint)
    base = begin.base
    if record.adapter and record.base == job.fingerprint:
        shutil.copytree(begin.base, folder / MODEL)
        base = str(store.folder(job.fingerprint) / MODEL)
    own = roles.tensors(settings.produces)
    save_policy(
        roles,
        settings.produces,
        folder,
        tokenizer=tokenizer,
        base_reference=base,
        base_revision=begin.revision,
        state={name: tensor for name, tensor in state.items() if name in own},  # a critic stays behind
    )
    shutil.copy(work / "metrics.jsonl", folder / "metrics.jsonl")
    if (work / "samples.jsonl").exists():
        shutil.copy(work / "samples.jsonl", folder / "samples.jsonl")
    data = {name: report.model_dump(mode="json") for name, report in reports.items()}
    for name, content in {"data.json": data, **(judgement.files if judgement else {})}.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    manifest = manifest_of(
        job,
        data=data,
        metrics=_last_values(work / "metrics.jsonl") | (judgement.metrics if judgement else {}),
        seed=settings.train.seed,
        seconds=seconds,
        policy=record if settings.produces == "policy" else None,
        reward=record if settings.produces == "reward" else None,
        packing=asdict(packing) if packing else {},
        steps=steps,
    )
    write_card(folder, manifest)
    store.add(manifest, folder)
    for leftover in ("staging", "checkpoints", "best", "merged", "rollouts"):
        shutil.rmtree(work / leftover, ignore_errors=True)


def _last_values(metrics: Path) -> dict[str, float]:
    """The last value of every logged metric."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {k: v for line in lines for k, v in line.items() if isinstance(v, int | float) and k != "step"}
