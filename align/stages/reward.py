"""What a reward stage does beside its training: samples of its start before, an evaluation and a scale after."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.artifacts.seal import write_atomic
from align.artifacts.store import Store
from align.data import Completion, Example
from align.errors import RecipeError
from align.evaluation.reward import Judged, evaluate_rewards, headline
from align.methods.reward import Reward
from align.models.rewards import NORMALIZATION, Normalization, load_reward_base
from align.models.roles import RoleModel
from align.rollout import generate
from align.spec.job import Job
from align.stages import start
from align.training import collectives
from align.training.checkpoint import put_trainable
from align.training.rewards import completion_rewards
from align.training.step import Step

logger = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
"""How good the reward model is, in its artifact."""


@dataclass(frozen=True)
class Judgement:
    """A finished reward model, judged.

    Attributes:
        evaluation: What `evaluation.json` has.
        normalization: What makes its rewards comparable with others.
    """

    evaluation: dict[str, Any]
    normalization: Normalization

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """What belongs into the artifact, by name."""
        return {EVALUATION: self.evaluation, NORMALIZATION: self.normalization.model_dump()}

    @property
    def metrics(self) -> dict[str, float]:
        """What belongs into the manifest."""
        scale = {"normalization/mean": self.normalization.mean, "normalization/std": self.normalization.std}
        return headline(self.evaluation) | (scale if self.normalization.n else {})


def draw_samples(
    job: Job, settings: Reward, store: Store, examples: Sequence[Example], tokenizer: Any, report: Any
) -> list[Example]:
    """Completions of the policy that the stage starts from, for `normalise: samples`; the same on every rank.

    Rank 0 draws them, with a copy of the model that is freed again: before the trainer exists, so that training in full
    does not move the base under it and ZeRO-3 does not take it apart. They are kept in the work folder.

    Raises:
        RecipeError: The stage starts from a model that writes nothing, or no prompt leaves room for a completion.
    """
    if settings.normalise != "samples":
        return []
    kept, drawn = Path(job.work) / "samples.json", None
    if collectives.rank() == 0:
        if not kept.exists():
            report(0, 0, f"drawing samples of {settings.policy or 'the base'}")
            write_atomic(kept, json.dumps(_draw(job, settings, store, examples, tokenizer)))
        drawn = json.loads(kept.read_text())
    rows = collectives.gather_objects(drawn)[0]
    assert rows is not None
    return [Example(i, p, (Completion(c, [True] * len(c), False),), 1.0) for i, (p, c) in enumerate(rows)]


def _draw(
    job: Job, settings: Reward, store: Store, examples: Sequence[Example], tokenizer: Any
) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) as token ids."""
    assert job.model is not None
    begin, model = start.of_policy(job, settings, store), job.model
    base, score = load_reward_base(
        begin.base, quantization=model.quantization, dtype=model.dtype, revision=begin.revision
    )
    where = f"stages.{job.stage}.normalise"
    if score is not None:
        raise RecipeError(f"{begin.base} is a reward model: it writes nothing", where=where, fix="write data, or none")
    roles = RoleModel(base)
    if begin.adapter is None:
        roles.add_base_role("start")
    else:
        roles.add_adapter("start", folder=begin.adapter, revision=begin.adapter_revision, trainable=False)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None) or 2**20
    room = positions - settings.generation.max_new_tokens
    prompts = [list(p) for p in dict.fromkeys(tuple(e.prompt_ids) for e in examples) if len(p) <= room]
    if not prompts:
        raise RecipeError(
            f"no prompt leaves room for {settings.generation.max_new_tokens} tokens in {positions} positions",
            where=f"stages.{job.stage}.generation.max_new_tokens",
            fix="set it lower",
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(settings.train.seed)).tolist()
    chosen = [prompts[i] for i in order[: settings.normalise_prompts]]
    completions = generate(roles, "start", chosen, settings.generation, tokenizer)
    del roles, base
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return list(zip(chosen, completions, strict=True))


@dataclass(frozen=True)
class Finished:
    """A reward model that has been trained.

    Attributes:
        roles: The model.
        wrapped: The same as the launcher wrapped it.
        step: The role, and how its sequences are packed.
        steps: How many there were.
        examples: What it was trained on.
        validation: What was held out.
        state: The tensors that the stage ends with.
    """

    roles: RoleModel
    wrapped: Any
    step: Step
    steps: int
    examples: Sequence[Example]
    validation: Sequence[Example]
    state: dict[str, Tensor]


def judge(finished: Finished, settings: Reward, samples: Sequence[Example], report: Any) -> Judgement:
    """Evaluate the weights that the stage ends with, and find their scale; all ranks together, after `fit`.

    Args:
        finished: The model, which has its final weights afterwards, and its examples.
        settings: Of the stage.
        samples: What `draw_samples` gave.
        report: Told what is being done.
    """
    total, held_out = finished.steps, list(finished.validation)
    if settings.train.validation and settings.train.validation.keep == "best":
        put_trainable(finished.roles, finished.state)

    def rewards(examples: Sequence[Example], what: str) -> list[tuple[float, ...]]:
        report(total, total, f"rewards of {len(examples)} {what}")
        pack_tokens, packing = settings.train.pack_tokens, finished.step.packing
        return completion_rewards(finished.wrapped, finished.step.role, examples, pack_tokens, packing)

    trained = rewards(finished.examples, "training examples") if settings.normalise == "data" or not held_out else []
    measured = rewards(held_out, "held-out examples") if held_out else trained
    evaluation = evaluate_rewards(_judged(held_out or finished.examples, measured))
    reference = {"data": trained, "samples": rewards(samples, "samples") if samples else [], "none": []}
    scale = _normalization([r for row in reference[settings.normalise] for r in row], settings)
    return Judgement({"on": "held-out" if held_out else "training"} | evaluation, scale)


def _judged(examples: Sequence[Example], rewards: Sequence[Sequence[float]]) -> list[Judged]:
    """The candidates of each example; a target is none."""
    return [
        Judged(own[: len(e.scores)], e.scores, [len(c.ids) for c in e.completions[: len(e.scores)]])
        for e, own in zip(examples, rewards, strict=True)
    ]


def _normalization(rewards: Sequence[float], settings: Reward) -> Normalization:
    if settings.normalise == "none":
        return Normalization()
    mean, std = float(np.mean(rewards)), float(np.std(rewards))
    if std < 1e-6 * max(1.0, abs(mean)):
        logger.warning("all rewards are %.6g: they are shifted to 0 and not scaled", mean)
        std = 1.0
    return Normalization(mean=mean, std=std, n=len(rewards), on=settings.normalise)
