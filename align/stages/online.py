"""What a stage on rollouts has beside its policy: prompts, the seats of reference, reward model and critic, scorers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.artifacts.store import Store
from align.data import DataReport, Example, PromptExample, load_examples, load_prompts
from align.errors import RecipeError
from align.methods import Method, get_method
from align.methods.ppo import PPO
from align.models.rewards import load_reward
from align.models.roles import RoleModel
from align.spec.job import Job
from align.spec.online import RolloutStage
from align.spec.scored import REWARD
from align.stages.material import Material
from align.stages.own_reward import OwnReward
from align.stages.scorers import columns_of, scorers_of
from align.training.online import Judges, Online
from align.training.rollout_step import CRITIC, RolloutStep
from align.training.schedule import RolloutSchedule
from align.types import Batch, Needs


def read_prompts(
    job: Job, settings: RolloutStage, tokenizer: Any, positions: int | None, quarantine: Path | None
) -> tuple[list[PromptExample], DataReport]:
    """The prompts that leave room for a completion.

    Raises:
        RecipeError: The settings leave no room at all.
        DataError: No prompt is left.
    """
    new = settings.generation.max_new_tokens
    room = min(settings.train.max_tokens, positions or settings.train.max_tokens) - new
    if room < 1:
        raise RecipeError(
            f"{new} new tokens leave no room for a prompt in {room + new} tokens",
            where=f"stages.{job.stage}.generation.max_new_tokens",
            fix="set it lower, or train.max_tokens higher",
        )
    source = job.data[settings.prompts]
    return load_prompts(source, tokenizer=tokenizer, max_tokens=room, folder=Path(job.folder), quarantine=quarantine)


def read_texts(job: Job, settings: RolloutStage, tokenizer: Any) -> tuple[list[Example], dict[str, DataReport]]:
    """What PPO-ptx mixes in."""
    if not isinstance(settings, PPO) or settings.ptx is None:
        return [], {}
    texts, report = load_examples(
        job.data[settings.ptx],
        batch=Batch.TOKENS,
        tokenizer=tokenizer,
        max_tokens=settings.train.max_tokens,
        folder=Path(job.folder),
    )
    return texts, {settings.ptx: report}


def add_seats(job: Job, settings: RolloutStage, method: Method, store: Store, roles: RoleModel, own: bool) -> None:
    """Put reward model and critic onto the policy's base.

    Args:
        job: The stage.
        settings: Its settings.
        method: Its method.
        store: Where the reward model is.
        roles: The model, with its policy.
        own: Whether the reward model has a base of its own.
    """
    shared = None if settings.reward is None or own else job.inputs[settings.reward]
    if shared is not None:
        load_reward(store, shared, REWARD, onto=roles)
    if Needs.VALUES not in method.needs:
        return
    if shared is not None and isinstance(settings, PPO) and settings.critic_start == "reward":
        load_reward(store, shared, CRITIC, onto=roles, trainable=True)
    else:
        roles.add_adapter(CRITIC, copy_of="policy", trainable=True)
        roles.add_head(CRITIC).reset_parameters()


def seat(
    job: Job,
    settings: RolloutStage,
    store: Store,
    roles: RoleModel,
    material: Material,
    schedule: Any,
    reward: OwnReward | None,
    report: Any,
) -> dict[str, Any]:
    """Give every role its seat on the model, and the trainer what it needs beside a model.

    Args:
        job: The stage.
        settings: Its settings.
        store: Where the reward model is.
        roles: The model, with its policy and reference.
        material: Prompts, and texts to mix in.
        schedule: The `RolloutSchedule`.
        reward: A reward model with a base of its own.
        report: Told what is being done.

    Returns:
        Arguments of the trainer.
    """
    assert isinstance(schedule, RolloutSchedule)
    method = get_method(job.kind)
    if reward is not None:
        reward.check(material.prompts, settings.generation.max_new_tokens)
    add_seats(job, settings, method, store, roles, own=reward is not None)
    online = Online(
        settings,
        method,
        prompts=material.prompts,
        judges=_judges(job, settings, reward),
        schedule=schedule,
        tokenizer=material.tokenizer,
        reference=getattr(settings, "reference", None) is not None,
        texts=material.examples,
        synced=job.launch.deepspeed == "zero3",
        work=Path(job.work),
        report=report,
    )
    rate = settings.critic_learning_rate if isinstance(settings, PPO) else None
    step = RolloutStep(method, settings, settings.train.pack_tokens)
    return {"step": step, "online": online, "learning_rates": {CRITIC: rate} if rate else {}}


def _judges(job: Job, settings: RolloutStage, reward: OwnReward | None) -> Judges:
    scorers = scorers_of(job, settings)
    columns = columns_of(scorers)
    weights = {columns[name]: settings.weights.get(name, 1.0) for name in scorers}
    named = {columns[name]: (name, scorer) for name, scorer in scorers.items()}
    if settings.reward is None:
        return Judges(named, weights)
    return Judges(named, weights | {REWARD: settings.weights.get(REWARD, 1.0)}, reward or "shared")
