"""A rollout on disk and in memory: what was drawn, what it scored, and what the method made of it.

A folder with two files, whole or absent: `rollout.safetensors` with every number, `rollout.json` with the rest. P
prompts, C completions, N tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.data.chat import Completion, Example
from align.types import Advantages, Rollout

TENSORS, REST = "rollout.safetensors", "rollout.json"


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is known of the tokens of an example's completions, [n] each, one completion after the other.

    Attributes:
        advantages: Of every token.
        kept: One per completion: whether it takes part in the loss.
        old: Log-probabilities under the policy that drew them; None where the first update takes its own.
        reference: The same under the reference.
        values: What the critic said.
        returns: What it should have said.
    """

    advantages: Tensor
    kept: tuple[bool, ...]
    old: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RolloutExample(Example):
    """A prompt with the completions that the policy drew for it."""

    drawn: Drawn | None = None


def completions_of(drawn: Sequence[list[int]]) -> tuple[Completion, ...]:
    """Completions that are trained on whole, from their token ids."""
    return tuple(Completion(ids, [True] * len(ids), False) for ids in drawn)


@dataclass
class Progress:
    """What a run of rollouts carries from one to the next.

    Attributes:
        beta: KL coefficient of the next rollout.
        count: Scores seen so far.
        mean: Their mean.
        square: Sum of their squared distances from it.
        history: A few numbers of every rollout so far, to tell when a score is being gamed.
        suspicious: Whether it looks like that.
    """

    beta: float
    count: int = 0
    mean: float = 0.0
    square: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    suspicious: bool = False

    def see(self, scores: Sequence[float]) -> None:
        """Take scores into mean and variance. *Source*: Chan et al., 1979, for adding a batch to a running variance."""
        n = len(scores)
        mean = sum(scores) / n
        square = sum((s - mean) ** 2 for s in scores)
        delta, total = mean - self.mean, self.count + n
        self.square += square + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        return (self.square / self.count) ** 0.5 if self.count else 0.0


@dataclass(frozen=True)
class Buffer:
    """One rollout.

    Attributes:
        number: Which it is, from 0.
        step: Optimizer steps the policy that drew it had taken.
        prompts: [P] token ids.
        rows: [P] rows of the data they are from.
        completions: [C] token ids, prompt after prompt.
        ended: [C] whether each ended by itself.
        rollout: Scores and log-probabilities.
        made: Advantages and returns.
        progress: What the next rollout goes on from.
        metrics: What is logged of it.
    """

    number: int
    step: int
    prompts: list[list[int]]
    rows: list[int]
    completions: list[list[int]]
    ended: list[bool]
    rollout: Rollout
    made: Advantages
    progress: Progress
    metrics: dict[str, float]

    def examples(self) -> list[RolloutExample]:
        """One per prompt."""
        rollout = self.rollout
        counts = torch.bincount(rollout.prompt, minlength=len(self.prompts)).tolist()
        per_token = {
            "advantages": self.made.advantages,
            "old": rollout.logps,
            "reference": rollout.reference,
            "values": rollout.values,
            "returns": self.made.returns,
        }
        found, c, t = [], 0, 0
        for prompt, row, k in zip(self.prompts, self.rows, counts, strict=True):
            ids = self.completions[c : c + k]
            tokens = slice(t, t + sum(map(len, ids)))
            own: dict[str, Any] = {name: None if all_ is None else all_[tokens] for name, all_ in per_token.items()}
            drawn = Drawn(kept=tuple(rollout.kept[c : c + k].tolist()), **own)
            found.append(RolloutExample(row, prompt, completions_of(ids), 1.0, drawn=drawn))
            c, t = c + k, tokens.stop
        return found

    def write(self, folder: Path) -> None:
        """Write both files into an existing folder."""
        tensors = {
            "prompt_ids": _flat(self.prompts),
            "prompt_lengths": torch.tensor([len(p) for p in self.prompts]),
            "completion_ids": _flat(self.completions),
            "rows": torch.tensor(self.rows),
            "ended": torch.tensor(self.ended),
            "scores": self.rollout.scores,
            "prompt": self.rollout.prompt,
            "length": self.rollout.length,
            "kept": self.rollout.kept,
            "advantages": self.made.advantages,
        }
        maybe = {
            "logps": self.rollout.logps,
            "reference": self.rollout.reference,
            "values": self.rollout.values,
            "returns": self.made.returns,
        }
        tensors |= {name: tensor for name, tensor in maybe.items() if tensor is not None}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
        rest = {"number": self.number, "step": self.step, "beta": self.rollout.beta, "metrics": self.metrics}
        (folder / REST).write_text(json.dumps(rest | {"progress": asdict(self.progress)}), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Buffer:
        """Read what `write` wrote."""
        t, rest = load_file(folder / TENSORS), json.loads((folder / REST).read_text(encoding="utf-8"))
        per_token = {name: t.get(name) for name in ("logps", "reference", "values")}
        rollout = Rollout(t["scores"], t["prompt"], t["length"], t["kept"], **per_token, beta=rest["beta"])
        return cls(
            number=rest["number"],
            step=rest["step"],
            prompts=[ids.tolist() for ids in t["prompt_ids"].split(t["prompt_lengths"].tolist())],
            rows=t["rows"].tolist(),
            completions=[ids.tolist() for ids in t["completion_ids"].split(t["length"].tolist())],
            ended=t["ended"].tolist(),
            rollout=rollout,
            made=Advantages(t["advantages"], t.get("returns")),
            progress=Progress(**rest["progress"]),
            metrics=rest["metrics"],
        )


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for row in rows for token in row], dtype=torch.long)
