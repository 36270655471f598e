"""A stage on rollouts under TRL: its settings in TRL's words, and its trainer put together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from align.artifacts.store import Store
from align.data import PromptExample
from align.methods.grpo import GRPO
from align.methods.rloo import RLOO
from align.models.policies import locate
from align.models.rewards import read_normalization
from align.models.tokenizer import end_ids
from align.spec.job import Job
from align.spec.online import RolloutStage
from align.stages import start
from align.stages.material import Material
from align.stages.own_reward import OwnReward, load_own_reward, shares_base
from align.stages.peer.feed import largest_divisor, numbers
from align.stages.peer.policy import PeerPolicy
from align.stages.peer.rollouts import Rollouts, on_rollouts
from align.stages.peer.scores import Scores
from align.stages.peer.seats import Seats
from align.stages.peer.trainer import arguments, autocasts, classes, silent
from align.stages.peer.watch import Watch
from align.stages.scorers import scorers_of
from align.training.metrics import MetricsFile
from align.training.schedule import RolloutSchedule

AGGREGATIONS = {"sequence_mean": "grpo", "token_mean": "dapo", "constant": "dr_grpo"}
"""`aggregation` of `kind: grpo` -> TRL's `loss_type`."""


def own_arguments(settings: RLOO | GRPO, weights: Sequence[float], micro: int) -> dict[str, Any]:
    """The arguments that only TRL's trainers on rollouts have.

    Args:
        settings: The stage's; `align check` has refused what is not expressed here.
        weights: What each score counts.
        micro: Completions of one forward pass.
    """
    generation, clip = settings.generation, settings.score_clip
    shared = {
        "num_generations": settings.completions,
        "steps_per_generation": settings.prompts_per_rollout * settings.completions // micro,
        "num_iterations": settings.epochs_per_rollout,
        "max_completion_length": generation.max_new_tokens,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "top_k": generation.top_k or 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "generation_kwargs": None,
        "use_vllm": False,
        "use_transformers_continuous_batching": False,
        "beta": settings.pull,
        "epsilon": settings.clip,
        "reward_weights": list(weights),
        "mask_truncated_completions": settings.missing_eos == "drop",
        "sync_ref_model": False,
        "disable_dropout": False,
        "shuffle_dataset": False,
        "pad_to_multiple_of": None,
        "router_aux_loss_coef": 0.0,
        "log_completions": False,
    }
    if isinstance(settings, RLOO):
        return shared | {
            "epsilon_high": None,
            "normalize_advantages": settings.normalise_advantages,
            "reward_clip_range": None if clip is None else (-clip, clip),
        }
    return shared | {
        "epsilon_high": settings.clip_high,
        "loss_type": AGGREGATIONS[settings.aggregation],
        "scale_rewards": {"std": "group", "none": "none"}[settings.scale],
        "multi_objective_aggregation": "sum_then_normalize",
        "importance_sampling_level": "token",
        "use_bias_correction_kl": settings.kl_ratio,
        "entropy_coef": settings.entropy_weight,
        "use_adaptive_entropy": False,
        "top_entropy_quantile": 1.0,
        "delta": None,
        "off_policy_mask_threshold": None,
        "cast_lm_head_to_fp32": False,
    }


def micro_batch(settings: RLOO | GRPO, prompts: Sequence[PromptExample]) -> int:
    """Completions of one forward pass: a divisor of those of an optimizer step that fits into `pack_tokens`.

    TRL takes the mean entropy of each pass, and align that of the whole step: where it has a weight, a step is a pass.
    """
    batch = settings.train.global_batch_size * settings.completions
    if settings.entropy_weight:
        return batch
    longest = max(len(p.prompt_ids) for p in prompts) + settings.generation.max_new_tokens
    return largest_divisor(batch, longest, settings.train.pack_tokens)


def seat(job: Job, settings: RolloutStage, policy: PeerPolicy, store: Store, tokenizer: Any) -> tuple[Seats, Any]:
    """The policy's seat and the reward model, on the policy's base where `engine: align` would have it there."""
    seats = Seats(policy, autocast=autocasts(job))
    if settings.reward is None or not shares_base(job, settings, store, start.of_policy(job, settings, store)):
        return seats, load_own_reward(job, settings, store, tokenizer)
    fingerprint = job.inputs[settings.reward]
    folder = locate(store, fingerprint, "reward").adapter
    assert folder is not None
    seats.add_reward(folder, read_normalization(store.folder(fingerprint)))
    return seats, OwnReward(seats, tokenizer, tokenizer, settings.train.pack_tokens)  # type: ignore[arg-type]


def make_rollouts(
    job: Job,
    settings: RolloutStage,
    policy: PeerPolicy,
    store: Store,
    material: Material,
    metrics: MetricsFile,
    report: Any,
) -> Rollouts:
    """What the stage draws and scores.

    Args:
        job: The stage.
        settings: Its settings, parsed.
        policy: What is trained.
        store: Where the reward model is read.
        material: What is asked.
        metrics: Where metrics are written.
        report: The worker's reporter.
    """
    tokenizer, prompts = material.tokenizer, material.prompts
    seats, reward = seat(job, settings, policy, store, tokenizer)
    return Rollouts(
        settings,
        prompts,
        RolloutSchedule.of(settings, len(prompts)),
        tokenizer=tokenizer,
        seats=seats,
        scores=Scores(settings, prompts, scorers_of(job, settings), reward),
        metrics=metrics,
        report=report,
    )


def make_rollout_trainer(
    job: Job, settings: RolloutStage, policy: PeerPolicy, store: Store, rollouts: Rollouts, watch: Watch
) -> Any:
    """TRL's trainer of a stage on rollouts.

    Args:
        job: The stage.
        settings: Its settings, parsed.
        policy: What is trained.
        store: Where the reference is read.
        rollouts: What it learns from.
        watch: The callback.
    """
    assert isinstance(settings, RLOO | GRPO)
    (parent, _), micro = classes(job.kind), micro_batch(settings, rollouts.prompts)
    passes = settings.train.global_batch_size * settings.completions // micro
    own = own_arguments(settings, rollouts.scores.weights, micro)
    trainer = on_rollouts(parent, watch, rollouts)(
        model=policy.model,
        reward_funcs=rollouts.scores.functions,
        args=arguments(job, settings, rollouts.schedule.total_steps, micro=micro, passes=passes, **own),
        train_dataset=numbers(0, len(rollouts.prompts), "prompt"),
        processing_class=copy.deepcopy(rollouts.tokenizer),  # TRL writes special tokens into it
        callbacks=[watch],
    )
    trainer.eos_token_ids = sorted({*trainer.eos_token_ids, *end_ids(rollouts.tokenizer)})
    policy.settle(store)
    return silent(trainer)
