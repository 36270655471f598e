"""From a stage's settings to `transformers.TrainingArguments`, every shared value stated and none left to a default."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainingArguments

import align
from align.spec.train import LaunchSettings, LoggingSettings, TrainSettings


def deepspeed_config(name: str) -> dict[str, Any] | None:
    """The shipped ZeRO file of that name, or None for `none`."""
    if name == "none":
        return None
    package = Path(align.__file__).parent
    # In a wheel the files lie inside the package, in a checkout beside it.
    folder = next(f for f in (package / "ds_configs", package.parent / "ds_configs") if f.is_dir())
    return json.loads((folder / f"{name}.json").read_text())


def training_arguments(
    settings: TrainSettings,
    *,
    work: Path,
    total_steps: int,
    launch: LaunchSettings,
    logging: LoggingSettings,
    bf16: bool,
    use_cpu: bool,
    deepspeed: dict[str, Any] | None,
    run_name: str = "align",
    config: Callable[..., TrainingArguments] = TrainingArguments,
    **own: Any,
) -> TrainingArguments:
    """Build the arguments.

    `use_cpu` is not a convenience: without it two CPU ranks would train two independent models. With ZeRO-3 this has
    to be called before the model is loaded. `own` are arguments of another class, `config`, and what it overrides.
    """
    validation = settings.validation
    # Naming a backend makes accelerate expect a process group, which one plain process does not have.
    backend = ("gloo" if use_cpu else "nccl") if dist.is_initialized() else None
    shared = partial(  # what is given again overrides it
        config,
        output_dir=str(work / "staging"),
        run_name=run_name,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=total_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=int(settings.warmup_ratio * total_steps),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        logging_strategy="steps",
        logging_steps=settings.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_every_steps,
        eval_strategy="steps" if validation else "no",
        eval_steps=validation.every_steps if validation else None,
        metric_for_best_model="eval_loss" if validation else None,
        greater_is_better=False if validation else None,
        seed=settings.seed,
        bf16=bf16,
        use_cpu=use_cpu,
        ddp_backend=backend,
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed if launch.deepspeed != "none" else None,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=list(logging.report_to) or "none",
    )
    args = shared(**own)
    if args.n_gpu > 1:
        args._n_gpu = 1  # one process drives one GPU; the Trainer would wrap the model in DataParallel otherwise
    return args
