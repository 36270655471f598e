"""Executes a stage with `engine: trl`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from align.artifacts.store import Store
from align.errors import TrainingError
from align.methods import get_method
from align.methods.reward import Reward
from align.recipe.packing import TRL
from align.spec.job import Job
from align.spec.online import RolloutStage
from align.spec.stages import PolicyStage
from align.stages import start
from align.stages.finish import publish_policy
from align.stages.material import Material
from align.stages.peer.feed import refuse
from align.stages.peer.online import make_rollout_trainer, make_rollouts
from align.stages.peer.policy import PeerPolicy
from align.stages.peer.trainer import import_trl, make_trainer
from align.stages.peer.watch import Watch
from align.stages.reward import Finished, draw_samples, judge
from align.training.metrics import MetricsFile
from align.training.schedule import Schedule
from align.training.step import Step


def train_with_trl(
    job: Job,
    settings: PolicyStage,
    store: Store,
    begin: start.Start,
    material: Material,
    *,
    began: float,
    report: Any,
) -> None:
    """Train one stage with TRL and put its artifact into the store.

    TRL's own checkpoints are pickles that nobody verifies, so none is kept: a stage that is stopped starts again.

    Args:
        job: The resolved stage.
        settings: Its settings, parsed.
        store: Where inputs are read and the artifact is added.
        begin: Where the policy starts.
        material: What it trains on.
        began: When the stage began, on the monotonic clock.
        report: The worker's reporter.

    Raises:
        LaunchError: TRL is not installed.
        DataError: The data has what TRL cannot express.
        TrainingError: A number is not finite, or a signal asked for a stop.
    """
    import_trl()
    tokenizer, examples = material.tokenizer, (material.examples, material.validation)
    refuse(get_method(job.kind).batch, [*examples[0], *examples[1]])
    samples = draw_samples(job, settings, store, examples[0], tokenizer, report) if isinstance(settings, Reward) else ()
    metrics = MetricsFile(Path(job.work) / "metrics.jsonl")
    metrics.forget_after(0)
    policy = PeerPolicy(job, settings, begin)
    watch, make = _prepared(job, settings, policy, store, material, metrics, report)
    try:
        trainer = make()
        trainer.train()
    finally:
        watch.signals.close()
    steps, total = trainer.state.global_step, trainer.state.max_steps
    if steps < total and watch.signals.received is not None:
        raise TrainingError(
            f"stopped by a signal after step {steps}; engine: trl keeps no checkpoints",
            fix="run the same command again: the stage starts from its beginning",
        )
    roles, state = policy.finished()
    judgement = None
    if isinstance(settings, Reward):
        step = Step(get_method(job.kind), settings, settings.train.pack_tokens)
        finished = Finished(roles, roles, step, total, *examples, state)
        judgement = judge(finished, settings, samples, report)
    assert job.model is not None
    origin = begin if policy.initial else start.itself(job)
    publish_policy(
        job,
        settings,
        store,
        roles=roles,
        begin=begin,
        record=origin.record(job.model, adapter=bool(policy.initial)),
        tokenizer=tokenizer,
        state=state,
        steps=steps,
        packing=TRL,
        reports=material.reports,
        judgement=judgement,
        seconds=time.monotonic() - began,
    )


def _prepared(
    job: Job,
    settings: PolicyStage,
    policy: PeerPolicy,
    store: Store,
    material: Material,
    metrics: MetricsFile,
    report: Any,
) -> tuple[Watch, Callable[[], Any]]:
    """What watches the trainer, and what makes it."""
    if isinstance(settings, RolloutStage):
        drawn = make_rollouts(job, settings, policy, store, material, metrics, report)
        watch = Watch(metrics, report, drawn.rows, drawn.names)
        return watch, partial(make_rollout_trainer, job, settings, policy, store, drawn, watch)
    trained, examples = material.examples, (material.examples, material.validation)
    schedule = Schedule.of(settings.train, len(trained))
    watch = Watch(metrics, report, lambda step: [trained[i].row for i in schedule.indices(step)])
    return watch, partial(make_trainer, job, settings, policy, store, material.tokenizer, examples, watch)
