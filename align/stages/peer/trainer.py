"""TRL's trainers on align's data: what is overridden is where batches come from, and what is done with numbers.

Every setting of TRL that could change a number is written down here; its defaults are its own and may move.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from align.artifacts.store import Store
from align.data.chat import Example
from align.errors import LaunchError
from align.methods import get_method
from align.methods.dpo import DPO
from align.methods.kto import KTO
from align.methods.reward import Reward
from align.methods.sft import SFT
from align.models.platform import compute_dtype, device
from align.spec.job import Job
from align.spec.stages import PolicyStage
from align.stages.peer.feed import EpochOrder, Feed, micro_batch, numbers, padding_id
from align.stages.peer.policy import PeerPolicy
from align.stages.peer.watch import Watch, watched
from align.training.arguments import training_arguments
from align.training.schedule import Schedule

DPO_LOSSES = {
    ("sigmoid", "sum"): "sigmoid",
    ("sigmoid", "token_mean"): "sigmoid_norm",
    ("robust", "sum"): "robust",
    ("rso", "sum"): "hinge",
}
"""`loss` and `reduction` of `kind: dpo` -> TRL's `loss_type`; `align check` refuses the others."""


def import_trl() -> Any:
    """The package.

    Raises:
        LaunchError: It is not installed.
    """
    try:
        import trl
    except ImportError as error:
        raise LaunchError(
            f"`engine: trl` needs TRL, which cannot be imported: {error}", fix="pip install 'align[trl]'"
        ) from error
    return trl


def classes(kind: str) -> tuple[Any, Any]:
    """TRL's trainer and its config class for a kind of stage."""
    trl = import_trl()
    name = "Reward" if kind == "reward" else kind.upper()
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


def own_arguments(settings: PolicyStage) -> dict[str, Any]:
    """The arguments that only the trainer of this kind has."""
    read = {
        "train_sampling_strategy": "sequential",  # of `EpochOrder`
        "activation_offloading": False,
        "max_length": None,
    }
    if isinstance(settings, SFT):
        return read | {
            "loss_type": "nll",
            "packing": False,
            "padding_free": False,
            "completion_only_loss": False,  # the labels say which tokens are trained
            "assistant_only_loss": False,
            "shuffle_dataset": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }
    if isinstance(settings, Reward):
        return read | {"disable_dropout": False, "center_rewards_coefficient": settings.centring or None}
    shared = read | {"disable_dropout": False, "precompute_ref_log_probs": False, "sync_ref_model": False}
    if isinstance(settings, DPO):
        return shared | {
            "loss_type": [DPO_LOSSES[settings.loss, settings.reduction]],
            "beta": settings.beta,
            "label_smoothing": settings.label_smoothing,
            "loss_weights": None,
            "ld_alpha": None,
            "f_divergence_type": "reverse_kl",
            "use_weighting": False,
            "padding_free": False,
        }
    assert isinstance(settings, KTO)
    return shared | {
        "loss_type": "kto",
        "beta": settings.beta,
        "desirable_weight": settings.desirable_weight,
        "undesirable_weight": settings.undesirable_weight,
    }


def arguments(job: Job, settings: PolicyStage, total_steps: int, *, micro: int, passes: int, **own: Any) -> Any:
    """TRL's config.

    Args:
        job: The stage.
        settings: Its settings, parsed.
        total_steps: Optimizer steps of the whole run.
        micro: Examples of one forward pass.
        passes: Forward passes of an optimizer step.
        own: What the trainer of this kind has beside what every trainer has.
    """
    assert job.model is not None
    return training_arguments(
        settings.train,
        work=Path(job.work),
        total_steps=total_steps,
        launch=job.launch,
        logging=job.logging,
        bf16=autocasts(job),
        use_cpu=device().type == "cpu",
        deepspeed=None,
        run_name=f"{job.recipe}/{job.stage}",
        config=classes(job.kind)[1],
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=passes,
        gradient_checkpointing=job.model.gradient_checkpointing or None,  # False is told to be an old name
        gradient_checkpointing_kwargs={"use_reentrant": False} if job.model.gradient_checkpointing else None,
        save_strategy="no",
        **own,
    )


def autocasts(job: Job) -> bool:
    """Whether fp32 weights compute in bf16; an adapter computes in fp32, and its base in the base's dtype."""
    assert job.model is not None
    return job.model.adapter == "none" and compute_dtype(job.model.dtype) is torch.bfloat16


def make_trainer(
    job: Job,
    settings: PolicyStage,
    policy: PeerPolicy,
    store: Store,
    tokenizer: Any,
    examples: tuple[Sequence[Example], Sequence[Example]],
    watch: Watch,
) -> Any:
    """TRL's trainer of this kind of stage, reading align's examples.

    Args:
        job: The stage.
        settings: Its settings, parsed.
        policy: What is trained.
        store: Where the reference is read.
        tokenizer: TRL reads its special tokens and writes some; it gets a copy.
        examples: What is trained on, and what is held out.
        watch: The callback.
    """
    (trained, held_out), kind = examples, get_method(job.kind).batch
    batch, schedule = settings.train.global_batch_size, Schedule.of(settings.train, len(trained))
    micro = micro_batch(kind, trained, batch, settings.train.pack_tokens)
    reference, tokenizer = policy.reference_model(store), copy.deepcopy(tokenizer)
    pad = padding_id(kind, [*trained, *held_out], tokenizer.pad_token_id, len(tokenizer))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    own = own_arguments(settings)
    trainer = _peer(classes(job.kind)[0], watch, schedule)(
        model=policy.model,
        args=arguments(job, settings, schedule.total_steps, micro=micro, passes=batch // micro, **own),
        data_collator=Feed(kind, [*trained, *held_out], pad, getattr(settings, "margin", "none")),
        train_dataset=numbers(0, len(trained)),
        eval_dataset=numbers(len(trained), len(held_out)) if held_out else None,
        processing_class=tokenizer,
        callbacks=[watch],
        **({} if reference is None else {"ref_model": reference}),
    )
    policy.settle(store)
    return silent(trainer)


def silent(trainer: Any) -> Any:
    """The trainer without its own progress."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _peer(parent: Any, watch: Watch, schedule: Schedule) -> Any:
    """A trainer of TRL that takes its batches as they come."""

    class Peer(watched(parent, watch)):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any, **__: Any) -> EpochOrder:
            return EpochOrder(schedule)

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
            samples, items = super().get_batch_samples(*args, **kwargs)
            self.step_rows = sum(len(batch["input_ids"]) for batch in samples)
            return samples, items

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_loss(model, inputs, *args, **kwargs)
            if not self.model.training or "labels" in inputs:  # of tokens: divided by those of the whole step
                return result
            # TRL takes the mean of the means of forward passes. The last step of an epoch may have passes of different
            # size, whose rows would count differently; elsewhere this is a factor of 1.
            share = len(inputs["input_ids"]) * self.current_gradient_accumulation_steps / self.step_rows
            return result * share

    return Peer
