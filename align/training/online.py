"""Rollout, scores, advantages: what a policy learns from its own completions is made here, once per rollout.

A rollout is a checkpointed buffer that feeds the same step as any data: the trainer asks for the examples of a step,
and where these are of a rollout that does not exist yet, it is made first, by all ranks together. Nothing is drawn
twice: buffers are kept in the work folder, and every checkpoint has the one that its next step may still need.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from align.data import Example, PromptExample
from align.errors import TrainingError
from align.logps import last_rewards, token_logps, token_values
from align.methods import Method
from align.rollout import keyed_draws, sample
from align.scoring import Scorer, score_completion
from align.spec.online import PenalisedKL, RolloutStage
from align.spec.scored import REWARD
from align.training import collectives
from align.training.buffer import Buffer, Progress, RolloutExample, completions_of
from align.training.checkpoint import checkpoints, step_of
from align.training.first_pass import FirstPass
from align.training.gaming import told_gaming
from align.training.guards import together
from align.training.kept import KeptRollouts, digest_of
from align.training.passes import Reading, run_passes
from align.training.rollout_step import RolloutStep, Said
from align.training.schedule import RolloutSchedule, Schedule
from align.training.step import pooled_means
from align.types import Needs, Rollout

logger = logging.getLogger(__name__)

ONLINE = "online.json"


class RewardModel(Protocol):
    """A reward model with a base of its own."""

    def rewards(
        self, prompts: Sequence[PromptExample], completions: Sequence[Sequence[list[int]]]
    ) -> list[list[float]]:
        """The reward of every completion of every prompt."""
        ...


@dataclass(frozen=True)
class Judges:
    """What scores completions.

    Attributes:
        scorers: Column -> (name, scorer).
        weights: Column -> what it counts in the sum; 0 for one that only watches.
        reward: `shared` for a role of the model that is trained, or a model of its own; None without one.
    """

    scorers: Mapping[str, tuple[str, Scorer]]
    weights: Mapping[str, float]
    reward: RewardModel | str | None = None

    @property
    def columns(self) -> list[str]:
        return [*([REWARD] if self.reward is not None else []), *self.scorers]


@dataclass
class _Part:
    """What one rank made of its share of a rollout, prompt by prompt: [k] or [tokens] each."""

    places: list[int]
    completions: list[list[list[int]]]
    ended: list[list[bool]]
    scores: dict[str, list[list[float]]]
    tensors: dict[str, list[Tensor]] = field(default_factory=dict)


class Online:
    """Makes the rollouts of a stage and hands out their examples.

    Args:
        stage: Its settings.
        method: Its method.
        prompts: What can be asked, the same on every rank.
        judges: What scores completions.
        schedule: Which prompts each rollout asks.
        tokenizer: The model's.
        reference: Whether the model has a role `reference`.
        texts: What is mixed into every update (PPO-ptx), as many as prompts.
        synced: Whether ranks have to draw in step (ZeRO-3).
        work: Folder of the unfinished stage.
        report: Told what is being done: (step, total, message).
    """

    def __init__(
        self,
        stage: RolloutStage,
        method: Method,
        *,
        prompts: Sequence[PromptExample],
        judges: Judges,
        schedule: RolloutSchedule,
        tokenizer: Any,
        reference: bool,
        texts: Sequence[Example] = (),
        synced: bool = False,
        work: Path,
        report: Any,
    ) -> None:
        self.stage, self.method, self.prompts, self.judges = stage, method, prompts, judges
        self.schedule, self.tokenizer, self.reference = schedule, tokenizer, reference
        self.texts, self.synced, self.work, self.report = texts, synced, work, report
        self.kept = KeptRollouts(work, tokenizer)
        batch, total = schedule.batch, schedule.total_steps
        self._text_schedule = Schedule(len(texts), batch, total, stage.train.seed + 2) if texts else None
        self.buffer: Buffer | None = None
        self.stopped: int | None = None
        """The rollout whose remaining updates are left out."""
        self._examples: list[RolloutExample] = []
        self._said: Said | None = None

    # What the trainer asks -------------------------------------------------------------------------------------------

    def prepare(self, model: Any, step: int, bound: RolloutStep) -> dict[str, float] | None:
        """Have the rollout that optimizer step `step` (from 0) learns from.

        Args:
            model: The `RoleModel`, as the launcher wrapped it.
            step: The optimizer step.
            bound: The method bound to its settings.

        Returns:
            What is logged of it if it is new to this run, else None.
        """
        number = self.schedule.rollout(step)
        if self.buffer is not None and self.buffer.number == number:
            return None
        weights = digest_of(getattr(model, "module", model).trainable_state().values())
        buffer = self.kept.find(number, weights)
        if buffer is None:
            buffer = self._make(model, number, step, bound)
            self.kept.keep(buffer, weights)
        if collectives.rank() == 0:
            self.kept.show(buffer)
        self._use(buffer)
        return buffer.metrics

    def examples(self, step: int, places: Sequence[int]) -> list[Example]:
        """The examples at these places of the present rollout, and this rank's share of the step's texts."""
        texts = self._text_schedule.indices(step) if self._text_schedule else []
        own = texts[collectives.rank() :: collectives.world_size()]
        return [*(self._examples[place] for place in places), *(self.texts[i] for i in own)]

    def take_said(self) -> Said | None:
        """What policy and critic said of the step's only pack when the rollout was made, to be learnt from once."""
        said, self._said = self._said, None
        return said

    def skips(self, step: int) -> bool:
        """Whether the update is left out because the policy has moved far enough from the one that drew the rollout."""
        return self.stopped == self.schedule.rollout(step)

    def updated(self, step: int, metrics: Mapping[str, tuple[float, float]]) -> None:
        """Note how far the policy had moved at the update that was just made; all ranks together.

        Args:
            step: The optimizer step, from 0.
            metrics: This rank's sums and weights of what was measured in it.
        """
        limit = self.stage.stop_kl
        if limit is not None:
            means = pooled_means(collectives.gather_objects(dict(metrics)))
            if means.get("policy/approx_kl", 0.0) > limit:
                self.stopped = self.schedule.rollout(step)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs into a checkpoint; on rank 0."""
        assert self.buffer is not None
        self.buffer.write(folder)
        (folder / ONLINE).write_text(json.dumps({"stopped": self.stopped}), encoding="utf-8")
        for oldest in checkpoints(self.work / "checkpoints")[:1]:
            self.kept.drop_before(self.schedule.rollout(step_of(oldest)))

    def load(self, folder: Path) -> None:
        """Go on from a verified checkpoint."""
        self.stopped = json.loads((folder / ONLINE).read_text(encoding="utf-8"))["stopped"]
        self._use(Buffer.read(folder))

    def _use(self, buffer: Buffer) -> None:
        self.buffer, self._examples = buffer, buffer.examples()

    # Making one ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _make(self, model: Any, number: int, step: int, bound: RolloutStep) -> Buffer:
        began, total = time.monotonic(), self.schedule.total_steps
        model.eval()
        asked = [self.prompts[i] for i in self.schedule.asked(number)]
        self.report(step, total, f"rollout {number + 1}: drawing {len(asked) * self.stage.completions} completions")
        part = self._draw(model, number, asked)
        self.report(step, total, f"rollout {number + 1}: scoring")
        own, first = [asked[place] for place in part.places], self._first_pass(model, step, bound, asked, part)
        self._passes(model, own, part, bound, first=first is not None)
        together(partial(self._score, own, part))
        if self.judges.reward is not None and not isinstance(self.judges.reward, str):
            part.scores[REWARD] = self.judges.reward.rewards(own, part.completions)
        whole = _merged(collectives.gather_objects(part), len(asked))
        if first is not None:
            self._said, parts = first.run(model)
            self._fill(whole, step, parts)
        _refuse_non_finite(whole, [p.row for p in asked], number, step)
        model.train()
        buffer = self._judged(number, step, asked, whole)
        seconds = time.monotonic() - began
        tokens = sum(map(len, buffer.completions))
        buffer.metrics.update({"rollout/seconds": seconds, "rollout/tokens_per_second": tokens / max(seconds, 1e-9)})
        return buffer

    def _draw(self, model: Any, number: int, asked: Sequence[PromptExample]) -> _Part:
        places = list(range(len(asked)))[collectives.rank() :: collectives.world_size()]
        stage, size = self.stage, self.schedule.size
        drawn = sample(
            model,
            "policy",
            [asked[place].prompt_ids for place in places],
            stage.generation,
            self.tokenizer,
            completions=stage.completions,
            draws=keyed_draws(stage.generation.seed, [number * size + place for place in places]),
            synced=partial(_any_rank, next(model.parameters()).device) if self.synced else None,
        )
        return _Part(
            places, [[d.ids for d in own] for own in drawn], [[d.ended for d in own] for own in drawn], scores={}
        )

    def _first_pass(
        self, model: Any, step: int, bound: RolloutStep, asked: Sequence[PromptExample], part: _Part
    ) -> FirstPass | None:
        """The pass of the only update, where one is wanted before it and nothing else is mixed in."""
        if self.schedule.updates > 1 or not self._wants_old or self.texts:
            return None
        whole = _merged(collectives.gather_objects(part), len(asked))
        examples = [
            RolloutExample(asked[i].row, asked[i].prompt_ids, completions_of(whole.completions[i]), 1.0)
            for i in self._trained(step)
        ]
        return FirstPass.of(bound, examples, next(model.parameters()).device)

    def _trained(self, step: int) -> list[int]:
        """Places in the rollout of the prompts that this rank learns from."""
        return self.schedule.indices(step)[collectives.rank() :: collectives.world_size()]

    def _fill(self, whole: _Part, step: int, parts: Sequence[dict[str, Tensor]]) -> None:
        """Add what the ranks found out about the prompts each of them learns from."""
        seen = collectives.gather_objects(dict(zip(self._trained(step), parts, strict=True)))
        found = {place: each for own in seen for place, each in own.items()}
        for name in parts[0]:
            whole.tensors[name] = [found[place][name] for place in whole.places]

    def _passes(
        self, model: Any, own: Sequence[PromptExample], part: _Part, bound: RolloutStep, *, first: bool
    ) -> None:
        """One pass each of the roles that the method wants; those of the update's own pass left out."""
        at = partial(token_logps, temperature=self.stage.generation.temperature)
        readings: dict[str, Reading] = {}
        if self._wants_old and not first:
            readings["logps"] = ("policy", at)
        if self.reference:
            readings["reference"] = ("reference", at)
        if Needs.VALUES in self.method.needs and not first:
            readings["values"] = ("critic", token_values)
        if self.judges.reward == "shared":
            readings[REWARD] = (REWARD, last_rewards)
        examples = [
            Example(p.row, p.prompt_ids, completions_of(each), 1.0)
            for p, each in zip(own, part.completions, strict=True)
        ]
        found = run_passes(model, list(readings.values()), examples, self.stage.train.pack_tokens, bound.packing)
        part.tensors = dict(zip(readings, found, strict=True))
        if REWARD in part.tensors:
            part.scores[REWARD] = [values.tolist() for values in part.tensors.pop(REWARD)]

    @property
    def _wants_old(self) -> bool:
        """Whether anybody reads the log-probabilities at the rollout: with one update, the ratio is 1 by itself."""
        shaped = isinstance(self.stage, PenalisedKL) and self.stage.pull > 0
        return self.schedule.updates > 1 or shaped or Needs.VALUES in self.method.needs

    def _score(self, own: Sequence[PromptExample], part: _Part) -> None:
        texts = [self.tokenizer.batch_decode(each, skip_special_tokens=True) for each in part.completions]
        for column, (name, scorer) in self.judges.scorers.items():
            part.scores[column] = [
                [score_completion(name, scorer, p.text, text, p.fields, p.row) for text in each]
                for p, each in zip(own, texts, strict=True)
            ]

    def _judged(self, number: int, step: int, asked: Sequence[PromptExample], whole: _Part) -> Buffer:
        """Scores become rewards, and rewards advantages; the same on every rank."""
        stage, before = self.stage, self.buffer.progress if self.buffer else Progress(getattr(self.stage, "beta", 0.0))
        completions = [ids for each in whole.completions for ids in each]
        ended = torch.tensor([e for each in whole.ended for e in each])
        parts = {
            column: torch.tensor([s for each in whole.scores[column] for s in each], dtype=torch.float32)
            for column in self.judges.columns
        }
        raw = sum((self.judges.weights[column] * scores for column, scores in parts.items()), torch.zeros(len(ended)))
        progress = Progress(before.beta, before.count, before.mean, before.square, list(before.history))
        scores = _shaped(raw, ended, stage, progress)
        tensors = {name: torch.cat(each) for name, each in whole.tensors.items()}
        rollout = Rollout(
            scores=scores,
            prompt=torch.arange(len(asked)).repeat_interleave(stage.completions),
            length=torch.tensor([len(ids) for ids in completions]),
            kept=ended | (stage.missing_eos != "drop"),
            beta=before.beta if getattr(stage, "pull", 0.0) else 0.0,
            **tensors,
        )
        assert self.method.advantages is not None
        made = self.method.advantages(rollout, stage)
        metrics = {"rollout/number": float(number)} | _metrics(rollout, raw, parts, ended, made.returns)
        if isinstance(stage, PenalisedKL) and "rollout/kl" in metrics:
            metrics["rollout/beta"] = rollout.beta
            progress.beta = steered(before.beta, metrics["rollout/kl"], len(completions), stage)
        progress.history.append({name: metrics[name] for name in _WATCHED if name in metrics} | _columns(metrics))
        suspicious = told_gaming(progress.history, [c for c in parts if self.judges.weights[c]], list(parts))
        for message in suspicious if not before.suspicious else ():  # once, and not with every rollout that follows
            logger.warning("rollout %d: %s", number + 1, message)
            self.report.warn(f"rollout {number + 1}: {message}")
        progress.suspicious, metrics["rollout/gamed"] = bool(suspicious), float(bool(suspicious))
        rows, prompts = [p.row for p in asked], [p.prompt_ids for p in asked]
        return Buffer(number, step, prompts, rows, completions, ended.tolist(), rollout, made, progress, metrics)


def _any_rank(device: torch.device, busy: bool) -> bool:
    return bool(collectives.gather_rows([float(busy)], device).any())


_WATCHED = ("rollout/kl", "rollout/length", "rollout/ended", "rollout/reward")


def _columns(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("score/")}


def steered(beta: float, kl: float, completions: int, stage: PenalisedKL) -> float:
    """The KL coefficient after a rollout.

    beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)
    *Source*: arXiv:1909.08593, section 2.2, as its code has it.

    Args:
        beta: Before.
        kl: Mean KL per completion, in nats.
        completions: n.
        stage: Reads `kl_target` and `kl_horizon`.
    """
    if stage.kl_target is None:
        return beta
    error = min(max(kl / stage.kl_target - 1, -0.2), 0.2)
    return beta * (1 + error * completions / stage.kl_horizon)


def _shaped(raw: Tensor, ended: Tensor, stage: RolloutStage, progress: Progress) -> Tensor:
    """[C] sums of scores, normalised, clipped, and with what a missing end costs."""
    scores = raw
    if stage.normalise_scores:
        progress.see(raw.tolist())
        scores = (scores - progress.mean) / (progress.std + 1e-8)
    if stage.score_clip is not None:
        scores = scores.clamp(-stage.score_clip, stage.score_clip)
    cost = torch.full_like(scores, stage.missing_eos_score)
    if stage.missing_eos == "replace":
        return torch.where(ended, scores, cost)
    return torch.where(ended, scores, scores + cost) if stage.missing_eos == "subtract" else scores


def _metrics(
    rollout: Rollout, raw: Tensor, parts: Mapping[str, Tensor], ended: Tensor, returns: Tensor | None
) -> dict[str, float]:
    spread = torch.stack([s.max() - s.min() for s in rollout.scores.split(torch.bincount(rollout.prompt).tolist())])
    found = {
        "rollout/score": raw.mean(),
        "rollout/reward": rollout.scores.mean(),
        "rollout/length": rollout.length.float().mean(),
        "rollout/ended": ended.float().mean(),
    }
    found |= {f"score/{column}": scores.mean() for column, scores in parts.items()}
    if len(spread) < len(rollout.scores):
        found["rollout/no_spread"] = (spread == 0).float().mean()
    if rollout.logps is not None and rollout.reference is not None:
        found["rollout/kl"] = (rollout.logps - rollout.reference).sum() / len(rollout.scores)
    if returns is not None and rollout.values is not None:
        found["value/explained_variance"] = 1 - (returns - rollout.values).var() / returns.var().clamp(min=1e-8)
    return {name: float(value) for name, value in found.items()}


def _refuse_non_finite(whole: _Part, rows: Sequence[int], number: int, step: int) -> None:
    """Stop before such a rollout is kept: a run after this one would take it up again.

    Raises:
        TrainingError: On every rank, for all of them hold the whole rollout.
    """
    scores = {f"score of `{name}`": each for name, each in whole.scores.items()}
    for what, of_prompts in (scores | {f"pass `{name}`": each for name, each in whole.tensors.items()}).items():
        bad = [row for row, each in zip(rows, of_prompts, strict=True) if not torch.as_tensor(each).isfinite().all()]
        if bad:
            raise TrainingError(
                f"the {what} is not finite in rollout {number + 1}; the weights are those of step {step}. Rows of the "
                f"data: {bad}",
                fix="lower learning_rate, look at these rows with `align data preview`, or use a wider dtype; "
                "the same command resumes from the last checkpoint",
            )


def _merged(parts: Sequence[_Part], prompts: int) -> _Part:
    """The parts of all ranks in the order of the prompts."""
    at = {place: (part, i) for part in parts for i, place in enumerate(part.places)}
    order = [at[place] for place in range(prompts)]
    names, columns = parts[0].tensors, parts[0].scores
    return _Part(
        list(range(prompts)),
        [part.completions[i] for part, i in order],
        [part.ended[i] for part, i in order],
        {column: [part.scores[column][i] for part, i in order] for column in columns},
        {name: [part.tensors[name][i] for part, i in order] for name in names},
    )
