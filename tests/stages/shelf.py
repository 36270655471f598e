"""A store with tiny policies on one base, and a reward model, for stages that use models without training one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align.artifacts.manifest import Manifest, PolicyRecord
from align.artifacts.store import Artifact, Store
from align.models import RoleModel, load_base, new_base, prepare_process, train_tokenizer
from align.models.rewards import NORMALIZATION, Normalization
from align.models.save import save_policy
from align.quickstart.world import FilmReviews
from align.recipe.made import RECORDS, records_made
from align.recipe.schema import stage_kinds
from align.spec.data import DataSource
from align.spec.job import Job
from align.spec.model import Architecture, ModelSettings, TokenizerSettings
from align.spec.records import RecordsStage
from tests.models.tiny import LORA, randomise

SHAPE = Architecture(hidden_size=64, intermediate_size=128, layers=2, heads=4, max_positions=192)


@dataclass
class Shelf:
    """The store, and what its policies share.

    Attributes:
        store: Has `base`, the adapters `sft` and `far` on it, and the reward model `rm`.
        tokenizer: Of all of them.
        told: What the last stage reported.
    """

    store: Store
    tokenizer: PreTrainedTokenizerBase
    told: list[tuple[int, int, str]] = field(default_factory=list)
    runs: int = 0

    def job(
        self, kind: str, data: dict[str, DataSource], *inputs: str, folder: Path | None = None, **settings: Any
    ) -> Job:
        """A job of a stage with a fingerprint that no other has."""
        self.runs += 1
        fingerprint = f"{self.runs:016d}" * 4
        stage = stage_kinds()[kind].model_validate(settings)
        return Job(
            recipe="tiny",
            stage=f"{kind}{self.runs}",
            kind=kind,
            settings=stage.model_dump(mode="json"),
            fingerprint=fingerprint,
            inputs={name: name[0] * 64 for name in inputs},
            data=data,
            folder=str(folder or "."),
            work=str(self.store.work(fingerprint)),
            home=str(self.store.home),
        )

    def run(self, job: Job) -> Artifact:
        """Run a job in this process."""
        from importlib import import_module

        self.told.clear()

        def report(*told: Any) -> None:
            self.told.append(told)

        self.report = report
        stage = stage_kinds()[job.kind].model_validate(job.settings)
        import_module(f"align.stages.{job.kind}").run(job, stage, self.store, report)
        return self.store.get(job.fingerprint)

    def made(self, job: Job) -> DataSource:
        """What a job made, as the entry that another reads."""
        stage = stage_kinds()[job.kind].model_validate(job.settings)
        assert isinstance(stage, RecordsStage)
        return records_made(stage, job.fingerprint, self.store.home)


def rows(artifact: Artifact) -> list[dict[str, Any]]:
    """The records of an artifact."""
    return [json.loads(line) for line in (artifact.folder / RECORDS).read_text(encoding="utf-8").split("\n") if line]


def make_shelf(home: Path) -> Shelf:
    prepare_process()
    store = Store(home)
    texts = [row["prompt"] for row in FilmReviews().generate("heldout", 60, 1, {})]
    tokenizer = train_tokenizer(texts, TokenizerSettings(vocab_size=300))
    model = new_base(SHAPE, tokenizer, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)  # far from uniform: what is said depends on the policy
        # About one token in eight ends a turn.
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
    roles = RoleModel(model)
    roles.train_base()
    full = PolicyRecord(
        base="b" * 64, base_kind="stage", adapter=False, model=ModelSettings(base="base", adapter="none")
    )
    _add(store, "base", roles, tokenizer, "policy", full, "")
    base = store.get("b" * 64).folder / "model"
    settings = ModelSettings(base="base", adapter=LORA)
    record = PolicyRecord(base="b" * 64, base_kind="stage", adapter=True, model=settings)
    for name, seed in (("sft", 1), ("far", 2), ("rm", 3)):
        role = "reward" if name == "rm" else "policy"
        roles = RoleModel(load_base(base))
        roles.add_adapter(role, settings=LORA, trainable=True, seed=seed)
        randomise(roles, role, seed=seed)
        if role == "reward":
            roles.add_head(role, seed=seed)
        _add(store, name, roles, tokenizer, role, record, str(base))
    return Shelf(store, tokenizer)


def _add(store: Store, name: str, roles: RoleModel, tokenizer: Any, role: str, record: PolicyRecord, base: str) -> None:
    kept = {"reward": record} if role == "reward" else {"policy": record}
    manifest = Manifest(kind="sft", stage=name, recipe="tiny", fingerprint=name[0] * 64, **kept)
    folder = store.temporary(manifest.fingerprint)
    save_policy(roles, role, folder, tokenizer=tokenizer, base_reference=base)
    if role == "reward":
        (folder / NORMALIZATION).write_text(Normalization(mean=0.5, std=2.0, n=3, on="data").model_dump_json())
    store.add(manifest, folder)


@contextmanager
def counted(module: Any, name: str) -> Iterator[list[Any]]:
    """What a function of a module is called with, while it goes on doing its work."""
    before, calls = getattr(module, name), []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return before(*args, **kwargs)

    setattr(module, name, counting)
    try:
        yield calls
    finally:
        setattr(module, name, before)
