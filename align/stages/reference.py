"""The reference of a stage: which policy it is, and the rows that the store keeps of it.

Reference log-probabilities are a node of the graph of their own: shared by every stage that asks for the same policy on
the same tokens, and planned and told by themselves. They are executed by the first stage that needs them, under a lock,
because a process of their own would load the base a second time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from align.artifacts.reference import PolicyKey, tokenizer_digest, weights_digest
from align.artifacts.store import Store
from align.data import Example
from align.errors import LaunchError
from align.logps.cache import RowCache
from align.logps.engine import choose_packing
from align.models.base import load_base
from align.models.platform import compute_dtype
from align.models.roles import RoleModel
from align.recipe.digest import Digests
from align.recipe.reference import rows_id
from align.recipe.rope import check_rope
from align.spec.job import Job
from align.spec.stages import PolicyStage, TrainedStage, reference_of
from align.stages import start
from align.training import collectives
from align.training.reference import References

Sets = Mapping[str, Sequence[Example]]
"""Name of a set of examples, training or validation -> the examples."""


def find_references(
    job: Job, settings: TrainedStage, store: Store, begin: start.Start, sets: Sets
) -> References | None:
    """What is there of a stage's reference, the rest to be computed by a role; None for a stage without one.

    Args:
        job: The stage.
        settings: Its settings, parsed.
        store: Where the rows are.
        begin: Where the policy starts; with `merge_parent` the merged base, which is then the reference too.
        sets: The examples.
    """
    name = reference_of(settings)
    if name is None or job.model is None:
        return None
    assert isinstance(settings, PolicyStage)
    reference = begin if job.model.merge_parent else start.of_stage(store, job.inputs[name])
    policy = start.of_policy(job, settings, store)
    folder, asked = None, ""
    if collectives.rank() == 0:
        digests = Digests(store.home)
        key = policy_key(job, reference, policy, digests)
        asked = rows_id(settings, job.data[settings.data], Path(job.folder), digests)  # type: ignore[attr-defined]
        digests.save()
        folder = store.references.open(key, job.inputs[name], _artifacts(store, job.inputs[name]))
    folder = collectives.gather_objects(folder)[0]
    assert folder is not None
    return References(sets, RowCache(folder), asked)


def read_second_copy(
    job: Job, settings: TrainedStage, store: Store, sets: Sets, report: Any = None
) -> References | None:
    """Full fine-tuning against another stage than the one it starts from: a second copy, read once and freed.

    With every row in the store it is not loaded at all. It runs before the trainer exists, so that ZeRO-3 does not take
    this copy apart as well.

    Returns:
        The references, none of them missing; None where the stage's own model has the reference.
    """
    name = reference_of(settings)
    if name is None or job.model is None or job.model.adapter != "none":
        return None
    assert isinstance(settings, PolicyStage)
    reference, begin = start.of_stage(store, job.inputs[name]), start.of_policy(job, settings, store)
    if reference.base == begin.base:
        return None
    references = find_references(job, settings, store, begin, sets)
    assert references is not None
    if references.missing:
        began = time.monotonic()
        base = load_base(reference.base, dtype=job.model.dtype, revision=reference.revision)
        check_rope(base.config, settings.train.max_tokens, f"the reference `{name}`")
        roles = RoleModel(base)
        roles.add_base_role("reference")
        wanted = settings.train.packing
        with torch.no_grad():
            packing = roles("reference", lambda lm: choose_packing(lm, dropout=False, wanted=wanted))
        references.cost.seconds += time.monotonic() - began
        tell = (lambda message: report(0, 0, message)) if report else (lambda message: None)
        references.compute(roles, "reference", pack_tokens=settings.train.pack_tokens, packing=packing, tell=tell)
    return references


def policy_key(job: Job, reference: start.Start, policy: start.Start, digests: Digests) -> PolicyKey:
    """Everything that decides the reference's log-probabilities of given tokens.

    Args:
        job: The stage that asks.
        reference: The reference as it is computed.
        policy: Where the stage's policy starts: its base has the tokenizer.
        digests: Of folders and Hub names.

    Raises:
        LaunchError: Nobody knows the commit of a Hub name.
    """
    assert job.model is not None
    full = job.model.adapter == "none"
    trained = reference.adapter is not None or (full and reference.base == policy.base)
    return PolicyKey(
        base=_content(reference, digests, tokenizer=False),
        quantization="none" if full else job.model.quantization,
        dtype=computed_in(job, trained=trained),
        adapter=None if reference.adapter is None else weights_digest(Path(reference.adapter), digests),
        tokenizer=_content(policy, digests, tokenizer=True),
    )


def computed_in(job: Job, *, trained: bool) -> str:
    """The compute dtype, and whether it works on fp32 weights, which round otherwise than weights of its own.

    Adapters and models trained in full are kept in fp32, unless DeepSpeed trains: then they have the compute dtype.

    Args:
        job: The stage.
        trained: Whether the reference has weights of that kind, and is not a frozen base or a second copy.
    """
    assert job.model is not None
    dtype = str(compute_dtype(job.model.dtype)).removeprefix("torch.")
    own = dtype == "float32" or not trained or job.launch.deepspeed != "none"
    return dtype if own else f"{dtype} on float32"


def _content(source: start.Start, digests: Digests, *, tokenizer: bool) -> str:
    if source.base_kind != "hub":
        digest = tokenizer_digest if tokenizer else weights_digest
        return digest(Path(source.base), digests)
    name = digests.hub("model", source.base, source.revision)
    if digests.unresolved:
        raise LaunchError(
            f"neither the Hub nor the local cache could be asked for {', '.join(digests.unresolved)}",
            fix="connect to the network, or download it before: hf download NAME",
        )
    return name


def _artifacts(store: Store, fingerprint: str) -> dict[str, Path]:
    """The artifacts that a policy consists of: its stage's, and that of its base where a stage trained it."""
    record = store.get(fingerprint).manifest.policy
    bases = [record.base] if record is not None and record.adapter and record.base_kind == "stage" else []
    return {folder.name: folder for folder in map(store.folder, [fingerprint, *bases])}
