"""The model that TRL trains, called as align calls a `RoleModel`: its policy, and a reward model on the same base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align.errors import RecipeError
from align.models.heads import ScalarHead
from align.models.rewards import Normalization
from align.rollout.request import drawing
from align.stages.peer.policy import TRAINED, PeerPolicy
from align.training.online import REWARD


class Seats(nn.Module):
    """The policy, and the reward model that shares its base.

    Args:
        policy: What TRL trains.
        autocast: Whether fp32 weights compute in bf16.

    Raises:
        RecipeError: TRL would compute the model's padded prompts wrongly.
    """

    def __init__(self, policy: PeerPolicy, *, autocast: bool) -> None:
        super().__init__()
        self.model, self.base, self.autocast = policy.model, policy.base, autocast
        self.head: ScalarHead | None = None
        if not hasattr(self.base, "model") or not hasattr(self.base, "lm_head"):
            raise RecipeError(
                f"TRL tells {type(self.base).__name__} no positions, and pads its prompts on the left",
                where="model.base",
                fix="write engine: align, or name a decoder like Llama, Qwen or Gemma",
            )

    @property
    def config(self) -> Any:
        return self.base.config

    def add_reward(self, folder: Path, normalization: Normalization) -> None:
        """Put a reward model's adapter onto the base, frozen, before TRL looks at the model.

        Args:
            folder: A PEFT adapter with a scalar head.
            normalization: Of its rewards.
        """
        from align.models import lora

        config, values, score = lora.read_adapter(folder, with_head=True)
        assert score is not None
        trained = {name for name, p in self.base.named_parameters() if p.requires_grad}
        lora.inject(self.base, REWARD, config)
        lora.fill(dict(lora.adapter_tensors(self.base, REWARD)), values, f"the adapter {folder}")
        lora.without_dropout(self.base, REWARD)
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_(name in trained)  # PEFT has taken the newest adapter for the one to train
        lora.activate(lora.layers(self.base), TRAINED)
        self.head = ScalarHead(self.config.get_text_config().hidden_size, next(self.base.parameters()).device)
        self.head.requires_grad_(False).weight.copy_(score)
        self.head.mean, self.head.std = normalization.mean, normalization.std

    def forward(self, role: str, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(causal_lm, *args)` as the policy, or with the reward model's head as its last argument."""
        device = next(self.base.parameters()).device.type
        with torch.autocast(device, dtype=torch.bfloat16) if self.autocast else nullcontext():
            if role != REWARD:
                return function(self.base, *args)
            with drawing(self), self._reward():
                return function(self.base, *args, self.head)

    @contextmanager
    def _reward(self) -> Iterator[None]:
        from align.models import lora

        layers = lora.layers(self.base)
        lora.activate(layers, REWARD)
        try:
            yield
        finally:
            lora.activate(layers, TRAINED)
