"""TRL's own trainers on the same model and the same token ids, their `training_step` called on their own batches."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from align.data.chat import Example
from align.models import lora, train_tokenizer
from align.spec.model import TokenizerSettings
from bench.arithmetic import Flops, Layout, forward_flops, layout, lengths, step_flops
from bench.arms import forget, in_order
from bench.clock import seconds
from bench.worlds import BETA, World, copy_of, draw

NOTES = {
    "trl default": "what a user gets who sets nothing: batches of 8, gradient checkpointing, the reference in every "
    "step with adapters off; bf16, its default, is on where the base is quantised and off in fp32, for equality",
    "trl tuned": "as far as a user could: no checkpointing, the reference precomputed, the fastest batch size with "
    "accumulation, rows of like length together; TRL 1.16 ignores padding_free for DPO, and knows no packing",
}
DEFAULT_BATCH = 8
TRAINED = "default"


class Peer:
    """One of TRL's trainers.

    Args:
        world: What it runs on.
        name: Of the arm.
        tuned: Whether its settings are those of a user who knows them.
        batch: Pairs per forward pass; a divisor of the step's.
    """

    deterministic = False

    def __init__(self, world: World, name: str, *, tuned: bool, batch: int) -> None:
        self.world, self.name, self.tuned, self.batch = world, name, tuned, batch
        self.reward = world.role == "reward"
        self.folder = tempfile.TemporaryDirectory()
        self.trainer = self._trainer()
        self.base = self.trainer.model.base_model.model
        draw(self.parameters())
        self.model = self._prepared()
        self.cut(batch)

    def cut(self, batch: int) -> None:
        """Cut the step into batches of so many pairs, as if the trainer had been made with that."""
        count = len(self.world.examples)
        order = in_order(self.world.examples) if self.tuned else list(range(count))
        self.batch, self.groups = batch, [order[i : i + batch] for i in range(0, count, batch)]
        self.passes = f"{len(self.groups)} x {batch} pairs"
        self.trainer.current_gradient_accumulation_steps = len(self.groups)
        self.batches = [self._collated(group) for group in self.groups]

    # Set-up ----------------------------------------------------------------------------------------------------------

    def _trainer(self) -> Any:
        import trl

        world = self.world
        settings: dict[str, Any] = {
            "output_dir": self.folder.name,
            "use_cpu": world.device.type == "cpu",
            "bf16": world.shape.quantized,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": len(self.world.examples) // self.batch,
            "dataloader_pin_memory": False,
        }
        if self.tuned:
            settings["gradient_checkpointing"] = False
        adapter = LoraConfig(
            r=world.shape.rank,
            lora_alpha=2 * world.shape.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="SEQ_CLS" if self.reward else "CAUSAL_LM",
            modules_to_save=["score"] if self.reward else None,
        )
        more = {"train_dataset": self._dataset(), "processing_class": _tokenizer(), "peft_config": adapter}
        with _silence():
            if self.reward:
                return trl.RewardTrainer(_scorer(world), trl.RewardConfig(**settings), **more)
            settings |= {"beta": BETA, "precompute_ref_log_probs": self.tuned}
            return _tokenised(trl.DPOTrainer)(copy_of(world.base), args=trl.DPOConfig(**settings), **more)

    def _dataset(self) -> Any:
        from datasets import Dataset

        return Dataset.from_list([_row(e, self.reward) for e in self.world.examples])

    def _prepared(self) -> nn.Module:
        """What `Trainer.train` does before its first step."""
        trainer = self.trainer
        if trainer.args.gradient_checkpointing:
            model = trainer.model  # `gradient_checkpointing_enable` before transformers 5.20
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model, _ = trainer._prepare_for_training(1, None, None)
        return model

    def _collated(self, group: Sequence[int]) -> dict[str, Tensor]:
        batch = self.trainer.data_collator([self.trainer.train_dataset[i] for i in group])
        return dict(self.trainer._prepare_inputs(dict(batch)))

    # An arm ----------------------------------------------------------------------------------------------------------

    def step(self) -> Tensor:
        losses = [self.trainer.training_step(self.model, dict(batch)) for batch in self.batches]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def values(self) -> Tensor:
        found: dict[tuple[int, int], Tensor] = {}
        for group, batch in zip(self.groups, self.batches, strict=True):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
            if self.reward:
                rows = list(self.model(**inputs).logits.float().split(1))
            else:
                mask = batch["completion_mask"] == 0
                labels = batch["input_ids"].masked_fill(mask, -100)
                logps = self.model(**inputs, labels=labels, fused_lm_head=True).log_probs
                rows = [row[~gone] for row, gone in zip(logps, mask[:, 1:], strict=True)]
            for k in range(2):
                for j, i in enumerate(group):
                    found[i, k] = rows[k * len(group) + j].flatten()
        return torch.cat([found[key] for key in sorted(found)]).float().cpu()

    def parameters(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(lora.adapter_tensors(self.base, TRAINED))
        if self.reward:
            found[f"{lora.DISK_PREFIX}score.weight"] = self.base.score.modules_to_save[TRAINED].weight
        return found

    def layout(self) -> Layout:
        """Positions and pairs; without Triton TRL scores every position of a row but its last."""
        groups = [lengths(self.world.examples[i] for i in group) for group in self.groups]
        if self.world.device.type == "cuda":
            return layout(groups, "rows")
        laid = layout(groups, "rows", everywhere=True)
        return replace(laid, scored=laid.scored - laid.heads)

    def flops(self) -> Flops:
        return step_flops(
            self.world.shape.sizes,
            self.layout(),
            head="none" if self.reward else "recomputed",
            checkpointing=not self.tuned,
            input_gradients=not self.tuned,
            live_reference=not self.tuned and not self.reward,
        )

    @torch.no_grad()
    def reference(self) -> Any:
        """The pass over the data that `precompute_ref_log_probs` adds before training."""
        return [self.trainer.compute_ref_log_probs(self.trainer.model, batch) for batch in self.batches]

    def reference_flops(self) -> Flops:
        """What `reference` has to compute."""
        return forward_flops(self.world.shape.sizes, self.layout(), adapter=False)

    @contextmanager
    def switched(self) -> Iterator[None]:
        yield


def peers(world: World, batch: int | None = None) -> list[Peer]:
    """Both of TRL's arms.

    Args:
        world: What they run on.
        batch: Of the tuned one; the fastest of a step's halves if absent.
    """
    pairs = len(world.examples)
    default = Peer(world, "trl default", tuned=False, batch=min(DEFAULT_BATCH, pairs))
    tuned = Peer(world, "trl tuned", tuned=True, batch=batch or 1)
    if batch is None:
        _tune(tuned, [pairs // n for n in (1, 2, 4, 8, 16) if pairs % n == 0])
    return [default, tuned]


def _tune(peer: Peer, batches: Sequence[int], trials: int = 2) -> None:
    taken: dict[int, float] = {}
    for batch in batches:
        peer.cut(batch)
        with contextlib.suppress(torch.OutOfMemoryError):
            taken[batch] = min(_seconds(peer) for _ in range(trials))
        forget(peer)
    peer.cut(min(taken, key=lambda batch: taken[batch]) if taken else 1)


def _seconds(peer: Peer) -> float:
    torch.use_deterministic_algorithms(peer.deterministic)
    taken = seconds(peer.step, peer.world.device)
    forget(peer)
    return taken


def _row(example: Example, reward: bool) -> dict[str, list[int]]:
    chosen, rejected = (c.ids for c in example.completions)
    if reward:
        return {"chosen_ids": example.prompt_ids + chosen, "rejected_ids": example.prompt_ids + rejected}
    return {"prompt_ids": example.prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected}


def _tokenised(trainer: type) -> type:
    """A trainer that takes token ids as they are; `RewardTrainer` does so by itself."""
    return type(trainer.__name__, (trainer,), {"_prepare_dataset": lambda self, dataset, *_: dataset})


def _tokenizer() -> Any:
    """TRL wants one; all that is read of it is which token pads, and no row holds that."""
    tokenizer = train_tokenizer(["a b c d"] * 8, TokenizerSettings(vocab_size=300))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _scorer(world: World) -> Any:
    """The base under a scalar head, as transformers' class for reward models."""
    base, config = copy_of(world.base), world.shape.config()
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=world.shape.dtype)
    model.model = base.model
    model.score = nn.Linear(world.shape.hidden, 1, bias=False, device=world.device, dtype=world.shape.dtype)
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer", "hf_device_map"):
        if hasattr(base, name):
            setattr(model, name, getattr(base, name))
    return model


@contextmanager
def _silence() -> Iterator[None]:
    """Without the advice and the progress bars that trainers print while they are made."""
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
