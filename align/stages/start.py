"""Where a policy stage starts from, and where its reference is: lineage turned into folders and roles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from align.artifacts.manifest import PolicyRecord
from align.artifacts.store import Store
from align.models.policies import locate
from align.recipe.env import resolve_env
from align.recipe.sources import base_folder
from align.spec.base import HubAdapter
from align.spec.job import Job
from align.spec.model import ModelSettings
from align.spec.stages import PolicyStage, reference_of


@dataclass(frozen=True)
class Start:
    """A base and maybe an adapter on it.

    Attributes:
        base: Folder or Hub name that the base is loaded from.
        base_name: What the manifest calls it: a fingerprint, a folder or a Hub name.
        base_kind: Which of the three.
        revision: Hub revision of the base.
        adapter: Folder or Hub name of the adapter, or None.
        adapter_revision: Hub revision of the adapter.
    """

    base: str
    base_name: str
    base_kind: Literal["stage", "path", "hub"]
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    def record(self, model: ModelSettings, adapter: bool) -> PolicyRecord:
        """What the manifest of a policy trained from here says of its model."""
        return PolicyRecord(
            base=self.base_name, base_kind=self.base_kind, revision=self.revision, adapter=adapter, model=model
        )


def of_stage(store: Store, fingerprint: str) -> Start:
    """The start that a finished policy stage offers."""
    source, record = locate(store, fingerprint), store.get(fingerprint).manifest.policy
    assert record is not None
    if source.adapter is None:
        return Start(source.base, fingerprint, "stage")
    return Start(source.base, record.base, record.base_kind, source.revision, str(source.adapter))


def itself(job: Job) -> Start:
    """The base that a stage trained in full becomes."""
    return Start("", job.fingerprint, "stage")


def of_model(job: Job, model: ModelSettings, store: Store) -> Start:
    """The start that the recipe's model offers: its base, with no adapter yet."""
    if model.base in job.inputs:
        return of_stage(store, job.inputs[model.base])
    folder = base_folder(model.base, Path(job.folder))
    if folder is not None:
        return Start(str(folder.resolve()), str(folder.resolve()), "path")
    name = str(resolve_env(model.base))
    return Start(name, name, "hub", model.revision)


def of_policy(job: Job, settings: PolicyStage, store: Store) -> Start:
    """Where the stage's own policy starts."""
    assert job.model is not None
    if isinstance(settings.policy, str):
        return of_stage(store, job.inputs[settings.policy])
    start = of_model(job, job.model, store)
    if isinstance(settings.policy, HubAdapter):
        local = base_folder(settings.policy.adapter, Path(job.folder))
        adapter = str(local.resolve()) if local else str(resolve_env(settings.policy.adapter))
        return replace(start, adapter=adapter, adapter_revision=settings.policy.revision)
    return start


def of_reference(job: Job, settings: PolicyStage, store: Store) -> Start | None:
    """Where the stage's reference is; None for a stage without one."""
    name = reference_of(settings)
    return None if name is None else of_stage(store, job.inputs[name])
