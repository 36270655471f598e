"""The pass of an update over its rollout, taken before there are advantages.

With one update per rollout, policy and critic would say the same of the same completions twice: for KL and advantages,
and for the loss. Where every rank's share is one pack they say it once: the graph waits until the advantages are there,
and no more is live than in any other step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.data.chat import Example
from align.logps import Pack
from align.training import collectives
from align.training.rollout_step import OneRole, RolloutStep, Said


@dataclass(frozen=True)
class FirstPass:
    """This rank's share of an update as one pack.

    Attributes:
        step: The method bound to its settings.
        examples: What the update learns from, in its order.
        pack: All of them.
    """

    step: RolloutStep
    examples: Sequence[Example]
    pack: Pack

    @classmethod
    def of(cls, step: RolloutStep, examples: Sequence[Example], device: torch.device) -> FirstPass | None:
        """None where some rank has another number of packs than one; all ranks together."""
        packs = step.packs(examples)
        alone = len(packs) == 1 and not isinstance(packs[0], OneRole)
        every = bool(collectives.gather_rows([float(alone)], device).all())
        return cls(step, examples, packs[0].to(device)) if every else None

    @torch.enable_grad()
    def run(self, model: Any) -> tuple[Said, list[dict[str, Tensor]]]:
        """What policy and critic say, and the same without a graph for each example, on the CPU.

        Args:
            model: The `RoleModel`, as the launcher wrapped it. Nothing else may be run through it before the backward
                pass: a wrapper takes this for the forward pass of the step.
        """
        model.train()
        said = self.step.run(model, self.pack)
        (logps, _), values = said
        sizes = [sum(len(c.ids) for c in self.examples[e].completions) for e in self.pack.examples]
        parts: list[dict[str, Tensor]] = [{} for _ in self.examples]
        for name, numbers in {"logps": logps, "values": values}.items():
            if numbers is not None:
                for e, part in zip(self.pack.examples, numbers.detach().float().cpu().split(sizes), strict=True):
                    parts[e][name] = part
        return said, parts
