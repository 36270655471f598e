"""Executes every kind that trains: data, model, roles, trainer, artifact."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from align.artifacts.manifest import PolicyRecord
from align.artifacts.store import Store
from align.data import DataReport, Example, load_examples, split_validation
from align.data.chat import LossOn
from align.data.check import training_texts
from align.methods import Method, get_method
from align.methods.pretrain import Pretrain
from align.methods.reward import Reward
from align.models.base import load_base, new_base, without_dropout
from align.models.platform import compute_dtype, device
from align.models.rewards import load_reward_base
from align.models.roles import RoleModel
from align.models.save import MODEL, empty_scorer, merge_adapter
from align.models.source import reading
from align.models.tokenizer import load_tokenizer, train_tokenizer
from align.recipe.sizes import positions_of
from align.spec.job import Job
from align.spec.model import ModelSettings
from align.spec.online import RolloutStage
from align.spec.stages import PolicyStage, TrainedStage, engine_of
from align.stages import online, start
from align.stages.finish import publish_policy
from align.stages.material import Material
from align.stages.own_reward import load_own_reward
from align.stages.reference import find_references, read_second_copy
from align.stages.reward import Finished, draw_samples, judge
from align.training import collectives
from align.training.arguments import deepspeed_config, training_arguments
from align.training.distributed import process_group
from align.training.schedule import RolloutSchedule, Schedule
from align.training.step import Step
from align.training.trainer import AlignTrainer


@dataclass(frozen=True)
class Opened:
    """The model of a stage, its roles set up.

    Attributes:
        roles: What is trained.
        reference_role: Role that computes the reference, `policy` for a policy that is its own at step 0, or None.
        same_reference: Whether policy and reference are the same stage.
        begin: Where the trained model starts.
        record: What the manifest will say of it.
    """

    roles: RoleModel
    reference_role: str | None
    same_reference: bool
    begin: start.Start
    record: PolicyRecord


def run(job: Job, settings: TrainedStage, store: Store, report: Any) -> None:
    """Train one stage and put its artifact into the store.

    Args:
        job: The resolved stage.
        settings: Its settings, parsed.
        store: Where inputs are read and the artifact is added.
        report: The worker's reporter.
    """
    began = time.monotonic()
    with process_group(deepspeed=job.launch.deepspeed != "none"):
        report(0, 0, "reading data")
        material = _material(job, settings, store)
        if engine_of(settings) == "trl":
            from align.stages.peer.run import train_with_trl

            assert isinstance(settings, PolicyStage)
            begin = _merged(job, start.of_policy(job, settings, store), material.tokenizer)
            train_with_trl(job, settings, store, begin, material, began=began, report=report)
            return
        _train(job, settings, store, material, report, began)


def _material(job: Job, settings: TrainedStage, store: Store) -> Material:
    tokenizer, method = _tokenizer(job, settings, store), get_method(job.kind)
    if isinstance(settings, RolloutStage):
        prompts, report = online.read_prompts(job, settings, tokenizer, _positions(job, settings, store), _bad(job))
        texts, reports = online.read_texts(job, settings, tokenizer)
        return Material(tokenizer, texts, (), {settings.prompts: report} | reports, prompts)
    examples, reports = _examples(job, settings, method, tokenizer)
    validation: Sequence[Example] = ()
    if settings.train.validation:
        examples, validation = split_validation(examples, settings.train.validation.fraction, settings.train.seed)
    return Material(tokenizer, examples, validation, reports)


def _train(job: Job, settings: TrainedStage, store: Store, material: Material, report: Any, began: float) -> None:
    """Train with align's own trainer."""
    tokenizer, examples = material.tokenizer, material.examples
    samples = draw_samples(job, settings, store, examples, tokenizer, report) if isinstance(settings, Reward) else ()
    asked = {"train": examples, "validation": material.validation}
    references, reward = None, None
    schedule: Schedule | RolloutSchedule
    if isinstance(settings, RolloutStage):
        schedule = RolloutSchedule.of(settings, len(material.prompts))
        reward = load_own_reward(job, settings, store, tokenizer)
    else:
        schedule = Schedule.of(settings.train, len(examples))
        references = read_second_copy(job, settings, store, asked, report)
    args = training_arguments(
        settings.train,
        work=Path(job.work),
        total_steps=schedule.total_steps,
        launch=job.launch,
        logging=job.logging,
        bf16=_dtype(job) is torch.bfloat16,
        use_cpu=device().type == "cpu",
        deepspeed=deepspeed_config(job.launch.deepspeed),
        run_name=f"{job.recipe}/{job.stage}",
    )
    opened = _open(job, settings, store, tokenizer)
    if isinstance(settings, RolloutStage):
        source = online.seat(job, settings, store, opened.roles, material, schedule, reward, report)
    else:
        source = {
            "step": Step(get_method(job.kind), settings, settings.train.pack_tokens),
            "examples": examples,
            "validation": material.validation,
            "validation_settings": settings.train.validation,
            "references": references or find_references(job, settings, store, opened.begin, asked),
            "reference_role": opened.reference_role,
            "same_reference": opened.same_reference,
        }
    trainer = AlignTrainer(
        opened.roles,
        args,
        schedule=schedule,
        work=Path(job.work),
        keep_checkpoints=settings.train.keep_checkpoints,
        report=report,
        **source,
    )
    try:
        trainer.fit()
        judgement = None
        if isinstance(settings, Reward):
            steps, sets = schedule.total_steps, (examples, material.validation)
            done = Finished(opened.roles, trainer.model_wrapped, trainer.step, steps, *sets, trainer.final_state)
            judgement = judge(done, settings, samples, report)
        if collectives.rank() == 0:
            publish_policy(
                job,
                settings,
                store,
                roles=opened.roles,
                begin=opened.begin,
                record=opened.record,
                tokenizer=tokenizer,
                state=trainer.final_state,
                steps=trainer.state.global_step,
                packing=trainer.packing,
                reports=material.reports,
                judgement=judgement,
                seconds=time.monotonic() - began,
            )
        collectives.barrier()
    finally:
        trainer.stop_request.close()


def _tokenizer(job: Job, settings: TrainedStage, store: Store) -> Any:
    if isinstance(settings, Pretrain):
        folder = Path(job.work) / "tokenizer"
        if collectives.rank() == 0 and not folder.exists():
            texts = training_texts(job.data[settings.data], Path(job.folder))
            made = train_tokenizer(texts, settings.tokenizer)
            made.save_pretrained(folder.with_suffix(".part"))
            folder.with_suffix(".part").rename(folder)
        collectives.barrier()
        return load_tokenizer(folder)
    assert isinstance(settings, PolicyStage)
    begin = start.of_policy(job, settings, store)
    return load_tokenizer(begin.base, begin.revision)


def _examples(
    job: Job, settings: TrainedStage, method: Method, tokenizer: Any
) -> tuple[list[Example], dict[str, DataReport]]:
    """Examples of the stage; every rank reads the same list, rank 0 alone writes the quarantine file."""
    name: str = settings.data  # type: ignore[attr-defined]
    loss_on: LossOn = "all" if isinstance(settings, Pretrain) else getattr(settings, "loss_on", "completion")
    examples, report = load_examples(
        job.data[name],
        batch=method.batch,
        tokenizer=tokenizer,
        max_tokens=settings.train.max_tokens,
        loss_on=loss_on,
        target=getattr(settings, "target", "") == "column",
        folder=Path(job.folder),
        quarantine=_bad(job),
    )
    return examples, {name: report}


def _bad(job: Job) -> Path | None:
    """Where malformed rows go; rank 0 alone writes them."""
    return Path(job.work) / "quarantine.jsonl" if collectives.rank() == 0 else None


def _positions(job: Job, settings: PolicyStage, store: Store) -> int | None:
    """Longest sequence that the base was made for."""
    begin = start.of_policy(job, settings, store)
    with reading(begin.base, "model"):
        config = AutoConfig.from_pretrained(begin.base, revision=begin.revision)
    return positions_of(config.to_dict())


def _dtype(job: Job) -> torch.dtype:
    return compute_dtype(job.model.dtype if job.model else "auto")


def _open(job: Job, settings: TrainedStage, store: Store, tokenizer: Any) -> Opened:
    """Load the base once and put every role on it."""
    if isinstance(settings, Pretrain):
        base = new_base(settings.architecture, tokenizer, settings.train.seed)
        roles = RoleModel(base)
        roles.train_base()
        own = start.itself(job)
        return Opened(roles, None, False, own, own.record(ModelSettings(base=job.stage, adapter="none"), adapter=False))
    assert isinstance(settings, PolicyStage)
    assert job.model is not None
    model = job.model
    parent = start.of_policy(job, settings, store)
    begin = _merged(job, parent, tokenizer)
    roles = _with_trained_role(settings, model, begin)
    role, same = None, False
    reference = start.of_reference(job, settings, store)
    if reference is not None:
        same = (reference.base, reference.adapter) == (parent.base, parent.adapter)
    if model.adapter == "none":
        role = None if reference is None else "policy"
        return Opened(roles, role, same, begin, start.itself(job).record(model, adapter=False))
    if reference is not None:
        role = "reference"
        if reference.adapter is None or (same and begin.adapter is None):
            roles.add_base_role("reference")
        else:
            roles.add_adapter("reference", folder=reference.adapter, trainable=False)
    return Opened(roles, role, same, begin, begin.record(model, adapter=True))


def _with_trained_role(settings: PolicyStage, model: ModelSettings, begin: start.Start) -> RoleModel:
    """The base, loaded, and on it the role that is trained: a policy, or a reward model with its head."""
    role, score, source = settings.produces, None, begin.base
    if role == "reward":
        base, score = load_reward_base(
            source, quantization=model.quantization, dtype=model.dtype, revision=begin.revision
        )
        empty_scorer(base.config)  # told now and not after the training
    else:
        base = load_base(source, quantization=model.quantization, dtype=model.dtype, revision=begin.revision)
    without_dropout(base)
    roles = RoleModel(base, gradient_checkpointing=model.gradient_checkpointing)
    if model.adapter == "none":
        roles.train_base(role)
    elif begin.adapter is not None:
        # An adapter of this recipe has to have the shape the recipe says; somebody else's has its own. How much dropout
        # is trained with is the recipe's word in both cases.
        shape = model.adapter if isinstance(settings.policy, str) else None
        roles.add_adapter(
            role,
            folder=begin.adapter,
            revision=begin.adapter_revision,
            settings=shape,
            dropout=model.adapter.dropout,
            with_head=role == "reward",
            trainable=True,
        )
    else:
        roles.add_adapter(role, settings=model.adapter, trainable=True, seed=settings.train.seed)
    if role == "reward" and not roles.has_head(role):
        roles.add_head(role, weight=score, seed=settings.train.seed)
    return roles


def _merged(job: Job, begin: start.Start, tokenizer: Any) -> start.Start:
    """With `merge_parent`, the parent's adapter merged into its dequantised base: a new base, kept in this artifact."""
    assert job.model is not None
    if not job.model.merge_parent or begin.adapter is None:
        return begin
    folder = Path(job.work) / "merged"
    if collectives.rank() == 0 and not folder.exists():
        partial = folder.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        merge_adapter(
            begin.base,
            begin.adapter,
            partial,
            tokenizer=tokenizer,
            quantization=job.model.quantization,
            dtype=job.model.dtype,
            revision=begin.revision,
            adapter_revision=begin.adapter_revision,
        )
        partial.rename(folder)
    collectives.barrier()
    return start.Start(str(folder / MODEL), job.fingerprint, "stage")
