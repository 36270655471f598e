"""The only `transformers.Trainer` subclass: an optimizer step per call, exact terms, guards, sealed checkpoints.

A Trainer batch is this rank's share of one optimizer step, as example indices. `training_step` cuts it into packs, runs
them, and owns the accumulation boundary, so `gradient_accumulation_steps` stays 1 under every launcher.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from align.artifacts.seal import verify
from align.data.chat import Example
from align.errors import TrainingError
from align.logps import check_head
from align.logps.engine import choose_engine
from align.recipe.packing import PackingChoice
from align.recipe.rope import check_rope
from align.spec.train import ValidationSettings
from align.training import checkpoint as ckpt
from align.training import collectives
from align.training.guards import FiniteGradients, Preempted, StopRequest, refuse_non_finite
from align.training.metrics import LeftOut, MetricsFile
from align.training.online import Online
from align.training.optimizer import set_apart
from align.training.reference import References, starting_kl
from align.training.rollout_step import RolloutStep
from align.training.schedule import RolloutSchedule, Schedule, StepDataset
from align.training.step import Reference, Step, Totals, pooled_means, scaled_loss

logger = logging.getLogger(__name__)


class Report(Protocol):
    """Where progress is told."""

    resumed_from_step: int

    def __call__(self, step: int, total: int, message: str) -> None:
        """Tell how far the run is."""

    def warn(self, message: str) -> None:
        """Tell what a user should know at once."""


class Silent:
    """Tells nobody."""

    resumed_from_step = 0

    def __call__(self, step: int, total: int, message: str) -> None:
        """Do nothing with it."""

    def warn(self, message: str) -> None:
        """Do nothing with it."""


class AlignTrainer(Trainer):
    """Trains the `policy` role of a `RoleModel` with one method.

    Args:
        model: A `RoleModel`.
        args: Training arguments; `output_dir` is a staging folder inside `work`.
        step: The method bound to its settings.
        schedule: Which examples each step sees.
        examples: Training examples, the same list on every rank.
        validation: Held-out examples, maybe none.
        validation_settings: When they are looked at and what follows.
        references: What is known of the reference's log-probabilities of these examples.
        reference_role: Role of the frozen reference, `policy` where the policy is its own reference at step 0 (full
            fine-tuning), or None where the method reads none.
        same_reference: Whether policy and reference start as the same stage, and so must agree.
        work: Folder of the unfinished stage.
        keep_checkpoints: How many to keep.
        report: Told of progress, on rank 0.
        online: Makes the examples of methods that learn from the policy's own completions; `examples` is empty then.
        learning_rates: Role -> its own learning rate, for a second trained role.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        step: Step,
        schedule: Schedule | RolloutSchedule,
        examples: Sequence[Example] = (),
        validation: Sequence[Example] = (),
        validation_settings: ValidationSettings | None = None,
        references: References | None = None,
        reference_role: str | None = None,
        same_reference: bool = False,
        work: Path,
        keep_checkpoints: int = 2,
        report: Report | None = None,
        online: Online | None = None,
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        dataset = StepDataset(schedule, collectives.rank(), collectives.world_size())
        super().__init__(model, args, train_dataset=dataset, eval_dataset=list(validation) or None)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.step, self.examples, self.validation = step, examples, validation
        self.validation_settings, self.online, self.learning_rates = validation_settings, online, learning_rates or {}
        self.reference_rows, self.reference_role, self.same_reference = references, reference_role, same_reference
        self.metrics_file = MetricsFile(work / "metrics.jsonl")
        self.work, self.keep_checkpoints, self.report = work, keep_checkpoints, report or Silent()
        self.resumed_from_step = 0
        self.final_state: dict[str, Tensor] = {}
        """The trained tensors the stage ends with, whole, once `fit` has returned."""
        self.packing: PackingChoice | None = None
        """How log-probabilities are computed; known once `fit` has proven it."""
        self.references: dict[str, Sequence[Reference]] = {}
        self.stop_request = StopRequest()
        self._gradients = FiniteGradients(p for p in model.parameters() if p.requires_grad)
        self._metrics = Totals()
        self._tokens, self._since = 0, time.monotonic()
        self._left_out = LeftOut()
        stage = self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0
        self._launch = {"zero": stage, "processes": collectives.world_size()}

    # --- data -----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Step after step, one item each; sharding over ranks is the data set's own."""
        assert self.train_dataset is not None
        return DataLoader(
            self.train_dataset, batch_size=1, sampler=SequentialSampler(self.train_dataset), collate_fn=lambda b: b[0]
        )

    # --- set-up and resume ----------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end, from the newest verified checkpoint if there is one.

        Raises:
            Preempted: If a signal asked for a stop.
            TrainingError: If a loss or a gradient is not finite; the weights are those of the step before.
            RecipeError: If the model computes sequences of this length by what is beside them.
        """
        check_rope(self.model.config, self.step.config.train.max_tokens)
        found = ckpt.latest_verified(self.work / "checkpoints") if collectives.rank() == 0 else None
        found = collectives.gather_objects(found)[0]
        if found is not None:
            ckpt.check_launch(found, self._launch)
            self.resumed_from_step = ckpt.step_of(found)
            logger.info("resuming from step %d", self.resumed_from_step)
            self.report.resumed_from_step = self._left_out.since = self.resumed_from_step
            if self.online is not None:
                self.online.load(found)
        if collectives.rank() == 0:
            self.metrics_file.forget_after(self.resumed_from_step)
            ckpt.forget_after(self.work / "best", self.resumed_from_step)
        collectives.barrier()
        self.train(resume_from_checkpoint=str(found) if found else None)
        if self.state.global_step < self.state.max_steps and self.stop_request.received is not None:
            raise Preempted(self.state.global_step)
        if self.validation_settings and self.validation_settings.keep == "best" and self.state.best_global_step:
            best = self.work / "best" / f"step-{self.state.best_global_step:06d}"
            verify(best)
            self.final_state = ckpt.read_trainable(best)
        else:
            self.final_state = ckpt.gather_trainable(self.model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None):
        """Wrap first; then the reference, while the policy is still where it starts; then the checkpoint."""
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, None)
        with torch.no_grad():
            model(self.step.role, self._prepare_engine)
        self._prepare_references(model, fresh=resume_from_checkpoint is None)
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            if self.is_deepspeed_enabled:
                path, _ = model.load_checkpoint(str(folder), load_module_strict=False)
                if path is None:
                    raise TrainingError(
                        f"DeepSpeed found no state in {folder}", fix="delete this checkpoint and run again"
                    )
            else:
                self.model.load_trainable_state(ckpt.read_trainable(folder))
            self._load_optimizer_and_scheduler(str(folder))
            # The intervals are cosmetic: those of this run count, not those of the run that wrote the checkpoint.
            self.state.compute_steps(self.args, max_steps)
        return model, loader

    def _prepare_engine(self, causal_lm: Any, *_: Any) -> None:
        """Prove the engine on the model and choose how sequences are packed; ZeRO-3 lets only tensors return."""
        if self.step.role == "policy":  # a reward passes through no language model's head, and may have none
            check_head(causal_lm)
        dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules())
        choice = choose_engine(causal_lm, dropout=dropout, wanted=self.step.config.train.packing)
        self.step, self.packing = replace(self.step, packing=choice.packing), choice.of_batch(self.step.method.batch)
        logger.info("packing %s", self.packing)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; a second trained role has groups of its own where it has a learning rate of its own."""
        fresh, optimizer = self.optimizer is None, super().create_optimizer(model)
        for role, rate in self.learning_rates.items() if fresh else ():
            set_apart(optimizer, self.model.tensors(role).values(), rate)
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: weights are loaded in `_prepare_for_training`, after the reference was taken."""

    def _prepare_references(self, model: nn.Module, *, fresh: bool) -> None:
        if self.reference_role is None:
            return
        assert self.reference_rows is not None
        self.reference_rows.compute(
            model,
            self.reference_role,
            pack_tokens=self.step.pack_tokens,
            packing=self.step.packing,
            tell=lambda message: self.report(0, self.state.max_steps or 0, message),
            stop=lambda: self.stop_request.received is not None,
        )
        if self.reference_rows.missing:
            raise Preempted(self.resumed_from_step)
        self.references = {name: self.reference_rows.totals(name) for name in self.reference_rows.sets}
        if fresh:
            few = slice(0, 16)
            kl = starting_kl(
                model,
                self.examples[few],
                self.references["train"][few],
                pack_tokens=self.step.pack_tokens,
                packing=self.step.packing,
                same=self.same_reference,
                dtype=torch.bfloat16 if self.args.bf16 else torch.float32,
            )
            self._write({"step": 0, **self.reference_rows.cost.metrics(), "start/log_ratio": kl})

    # --- one optimizer step ---------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Sequence[int], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of all packs of this step; under DeepSpeed the optimizer step too.

        Returns:
            This rank's share of the loss times the world size, so that the mean over ranks is the loss.
        """
        model.train()
        step = self.state.global_step
        bound = self.step
        if self.online is not None:
            assert isinstance(bound, RolloutStep)
            if (drawn := self.online.prepare(model, step, bound)) is not None:
                super().log(dict(drawn))  # to the trackers
                self._write({"step": step, **drawn})
            if self.online.skips(step):
                self._agree([], [])
                self._left_out.count += 1
                return torch.zeros((), device=self.args.device)
            bound = replace(bound, said=self.online.take_said())
        examples = self._examples(inputs)
        references = [self.references["train"][i] for i in inputs] if self.reference_role else None
        packs = list(self.step.packs(examples))
        rounds, weights = self._agree(packs, examples)
        statistics = self._statistics(model, examples, references)
        world, device = collectives.world_size(), self.args.device
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        no_sync: Any = getattr(model, "no_sync", contextlib.nullcontext)
        loss_sum, metrics = torch.zeros((), device=device), Totals()
        for i in range(rounds):
            last = i == rounds - 1
            with contextlib.nullcontext() if last or engine else no_sync():
                if i < len(packs):
                    output = bound.terms(model, packs[i].to(device), examples, references, statistics)
                    loss = scaled_loss(output, weights)
                    metrics.add(output.metrics)
                    self._tokens += packs[i].tokens
                else:
                    loss = self.step.touch(model, self.step.empty().to(device))
                if engine:
                    engine.set_gradient_accumulation_boundary(is_boundary=last)
                    engine.backward(loss * world)
                else:
                    (loss * world).backward()
            loss_sum += loss.detach()
        refuse_non_finite(loss_sum, self._gradients.pop(), [e.row for e in examples], step)
        self._metrics.merge(metrics)
        if self.online is not None:
            self.online.updated(step, metrics.numbers())
        if engine:
            engine.step()
        return loss_sum * world

    def _examples(self, inputs: Sequence[int]) -> list[Example]:
        """This rank's examples of the step."""
        if self.online is not None:
            return self.online.examples(self.state.global_step, inputs)
        return [self.examples[i] for i in inputs]

    @torch.no_grad()
    def _statistics(
        self, model: nn.Module, examples: Sequence[Example], references: Sequence[Reference] | None
    ) -> dict[str, Tensor]:
        """The method's statistic over the whole step and all ranks; nothing for a method without one."""
        if self.step.method.statistic is None:
            return {}
        packs = self.step.mismatched(examples)
        rounds = int(collectives.gather_rows([len(packs)], self.args.device).max())
        totals = Totals()
        for i in range(rounds):
            if i < len(packs):
                totals.add(self.step.statistics(model, packs[i].to(self.args.device), examples, references))
            else:
                self.step.touch(model, self.step.empty().to(self.args.device))
        means = pooled_means(collectives.gather_objects(totals.numbers()))
        return {name: torch.tensor(mean, dtype=torch.float32, device=self.args.device) for name, mean in means.items()}

    def _agree(self, packs: Sequence[Any], examples: Sequence[Example]) -> tuple[int, dict[str, float]]:
        """All ranks' number of packs (the maximum), term weights (the sum) and wish to stop."""
        weights = self.step.weights(examples, packs)
        seen = collectives.gather_objects((len(packs), weights, self.stop_request.received))
        total: dict[str, float] = {}
        for _, part, _ in seen:
            for name, weight in part.items():
                total[name] = total.get(name, 0.0) + weight
        if self.state.global_step + 1 == self.state.max_steps:
            self.control.should_log = True  # the last step is told, whatever the interval
        signals = [s for *_, s in seen if s is not None]
        if signals:
            self.stop_request.received = signals[0]
            self.control.should_save = self.control.should_training_stop = True
        return max(n for n, *_ in seen), total

    # --- validation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss and metrics over all held-out examples, with the terms and reductions of training."""
        model = self.model_wrapped
        model.eval()
        rank, world = collectives.rank(), collectives.world_size()
        examples = list(self.validation[rank::world])
        references = self.references["validation"][rank::world] if self.reference_role else None
        packs = self.step.packs(examples)
        statistics = self._statistics(model, examples, references)
        rounds = int(collectives.gather_rows([len(packs)], self.args.device).max())
        terms, metrics = Totals(), Totals()
        coefficients: dict[str, float] = {}
        for i in range(rounds):
            if i < len(packs):
                output = self.step.terms(model, packs[i].to(self.args.device), examples, references, statistics)
                terms.add(output.terms)
                metrics.add(output.metrics)
                coefficients |= {name: t.coefficient for name, t in output.terms.items()}
            else:
                self.step.touch(model, self.step.empty().to(self.args.device))
        model.train()
        seen = collectives.gather_objects((terms.numbers(), metrics.numbers(), coefficients))
        coefficient = {name: c for *_, part in seen for name, c in part.items()}
        means = pooled_means(part for part, *_ in seen)
        logs = {"eval_loss": sum(coefficient[name] * mean for name, mean in means.items())}
        logs |= {f"eval_{name}": mean for name, mean in pooled_means(part for _, part, _ in seen).items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)  # type: ignore[has-type]
        return logs

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Keep the weights of the best validation, and stop when patience is spent."""
        better = super()._determine_best_metric(metrics, trial)
        settings = self.validation_settings
        if settings is None:
            return better
        if better and settings.keep == "best":
            state = ckpt.gather_trainable(self.model)
            if collectives.rank() == 0:
                staged = self.work / "staging" / "best"
                ckpt.write_trainable(state, staged)
                ckpt.publish_checkpoint(staged, self.work / "best", self.state.global_step, self._launch)
                self._drop_bests()
            collectives.barrier()
        since = (self.state.global_step - (self.state.best_global_step or 0)) // settings.every_steps
        if settings.patience is not None and since >= settings.patience:
            self.control.should_training_stop = True
        return better

    # --- logging and checkpoints ----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the method's metrics since the last log, reduced over ranks once, and append a line to metrics.jsonl."""
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            parts = collectives.gather_objects((self._metrics.numbers(), self._tokens))
            elapsed = max(time.monotonic() - self._since, 1e-9)
            logs |= pooled_means(part for part, _ in parts)
            logs["tokens_per_second"] = sum(tokens for _, tokens in parts) / elapsed
            self._metrics, self._tokens, self._since = Totals(), 0, time.monotonic()
            self._left_out.correct(logs, self.state.global_step)
            said = f"loss {logs['loss']:.4f}" if "loss" in logs else "updates left out: the policy has moved enough"
            self.report(self.state.global_step, self.state.max_steps, said)
        super().log(logs, start_time)
        self._write({"step": self.state.global_step, **logs})

    def _write(self, line: dict[str, Any]) -> None:
        if collectives.rank() == 0:
            self.metrics_file.append(line)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trained tensors alone, whole, as safetensors; no pickled arguments."""
        assert output_dir is not None
        state = ckpt.gather_trainable(self.model)
        if collectives.rank() == 0:
            ckpt.write_trainable(state, Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if collectives.rank() == 0:  # DeepSpeed keeps only schedulers of its own making
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Stage, seal, rename: a checkpoint is whole or absent."""
        super()._save_checkpoint(model, trial)
        collectives.barrier()
        step = self.state.global_step
        if collectives.rank() == 0:
            staged = Path(self.args.output_dir) / f"checkpoint-{step}"
            if self.online is not None:
                self.online.save(staged)
            ckpt.publish_checkpoint(staged, self.work / "checkpoints", step, self._launch, self.keep_checkpoints)
            self._drop_bests()
        collectives.barrier()

    def _drop_bests(self) -> None:
        ckpt.drop_bests(self.work / "best", self.work / "checkpoints", self.state.best_global_step)
