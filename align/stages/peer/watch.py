"""What is done with the numbers of a trainer of TRL: names, progress, signals, and what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from align.errors import TrainingError
from align.training.guards import FiniteGradients, StopRequest
from align.training.metrics import MetricsFile

NAMES = {
    "rewards/accuracies": "rewards/accuracy",
    "rewards/margins": "rewards/margin",
    "accuracy": "rewards/accuracy",
    "margin": "rewards/margin",
    "min_reward": "rewards/min",
    "mean_reward": "rewards/mean",
    "max_reward": "rewards/max",
}
"""What TRL calls it -> what align calls it; everything else keeps TRL's name."""


class Watch(TrainerCallback):
    """Metrics under align's names, progress, signals, and numbers that are not finite.

    Args:
        metrics: Where metrics are written.
        report: The worker's reporter.
        rows: The rows of the data that an optimizer step (from 0) learns from.
        names: What TRL calls a metric -> what align calls it.
    """

    def __init__(
        self, metrics: MetricsFile, report: Any, rows: Callable[[int], list[int]], names: Mapping[str, str] = NAMES
    ) -> None:
        self.metrics, self.report, self.rows, self.names = metrics, report, rows, names
        self.signals = StopRequest()
        self.gradients: FiniteGradients | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients = FiniteGradients(p for p in model.parameters() if p.requires_grad)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            self.report(state.global_step, state.max_steps, f"loss {logs['loss']:.4f}")
        named = {self._named(name): value for name, value in logs.items() if value is not None}  # TRL's mean of nothing
        self.metrics.append({"step": state.global_step, **named})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.gradients is not None and self.gradients.pop():
            self.refuse("gradient", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signals.received is not None:
            control.should_training_stop = True

    def refuse(self, what: str, step: int) -> None:
        """Stop before the optimizer step, and say with which rows."""
        raise TrainingError(
            f"the {what} of step {step + 1} is not finite under engine: trl. Rows of the data in this batch: "
            f"{self.rows(step)}",
            fix="lower learning_rate, look at these rows with `align data preview`, or use a wider dtype",
        )

    def _named(self, name: str) -> str:
        prefix = "eval_" if name.startswith("eval_") else ""
        own = name.removeprefix(prefix)
        return prefix + self.names.get(own, own)


def watched(parent: Any, watch: Watch) -> Any:
    """A trainer of TRL that stops at a bad loss and tells nobody else what it does."""

    class Watched(parent):
        def _send_telemetry(self) -> None:
            """Nothing is sent anywhere."""

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            if not math.isfinite(float(loss)):
                watch.refuse("loss", self.state.global_step)
            return loss

    return Watched
