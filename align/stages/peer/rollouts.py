"""TRL's trainers on rollouts: prompts, completions and scores are align's, what TRL makes of them is its own.

Completions are drawn by align's sampler with align's numbers, for TRL's own generation draws from the global random
state and nothing after it could be compared. Which of them an optimizer step learns from is align's schedule.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align.data import PromptExample
from align.rollout import Sampled, keyed_draws, sample
from align.spec.online import PenalisedKL, RolloutStage
from align.stages.peer.feed import RolloutOrder
from align.stages.peer.scores import Scores
from align.stages.peer.seats import Seats
from align.stages.peer.watch import Watch, watched
from align.training.buffer import Buffer, Progress
from align.training.kept import KeptRollouts
from align.training.metrics import MetricsFile
from align.training.schedule import RolloutSchedule
from align.types import Advantages, Rollout

NAMES = {"entropy": "policy/entropy", "clip_ratio/region_mean": "policy/clip_fraction"}
"""What TRL calls it -> what align calls it, up to the mean over passes that TRL takes; the rest keeps TRL's name."""


class Rollouts:
    """Draws what TRL asks for, and tells what came of it.

    Args:
        settings: The stage's.
        prompts: What can be asked.
        schedule: Which prompts each rollout asks, and which of them each optimizer step learns from.
        tokenizer: The model's.
        seats: Policy and reward model.
        scores: What completions score.
        metrics: Where metrics are written.
        report: The worker's reporter.

    Attributes:
        number: The present rollout, from 0; None before there is one.
        drawn: [C] its completions, prompt after prompt.
    """

    def __init__(
        self,
        settings: RolloutStage,
        prompts: Sequence[PromptExample],
        schedule: RolloutSchedule,
        *,
        tokenizer: Any,
        seats: Seats,
        scores: Scores,
        metrics: MetricsFile,
        report: Any,
    ) -> None:
        self.settings, self.prompts, self.schedule, self.tokenizer = settings, prompts, schedule, tokenizer
        self.seats, self.scores, self.metrics, self.report = seats, scores, metrics, report
        self.kept = KeptRollouts(metrics.path.parent, tokenizer)
        self.number: int | None = None
        self.drawn: list[Sampled] = []

    @property
    def names(self) -> dict[str, str]:
        """What metrics are called; with completions left out, TRL's means count passes that have not a token."""
        return {} if self.settings.missing_eos == "drop" else NAMES

    def rows(self, step: int) -> list[int]:
        """Rows of the data that an optimizer step learns from."""
        asked = self.schedule.asked(self.schedule.rollout(step))
        return [self.prompts[asked[place]].row for place in self.schedule.indices(step)]

    def missing(self, step: int) -> bool:
        """Whether optimizer step `step` learns from a rollout that does not exist yet."""
        return self.number != self.schedule.rollout(step)

    def draw(self, step: int) -> list[list[int]]:
        """[C] the completions of a new rollout, those that `engine: align` would draw from these weights."""
        settings, number = self.settings, self.schedule.rollout(step)
        asked = [self.prompts[i] for i in self.schedule.asked(number)]
        message = f"rollout {number + 1}: drawing {len(asked) * settings.completions} completions"
        self.report(step, self.schedule.total_steps, message)
        drawn = sample(
            self.seats,
            "policy",
            [p.prompt_ids for p in asked],
            settings.generation,
            self.tokenizer,
            completions=settings.completions,
            draws=keyed_draws(settings.generation.seed, [number * len(asked) + place for place in range(len(asked))]),
        )
        self.number, self.drawn = number, [each for own in drawn for each in own]
        self.scores.ended = [each.ended for each in self.drawn]
        return [each.ids for each in self.drawn]

    def of_step(self, step: int) -> list[int]:
        """Places in the rollout of the completions that an optimizer step learns from."""
        k = self.settings.completions
        return [place * k + j for place in self.schedule.indices(step) for j in range(k)]

    def tell(self, step: int, rewards: Tensor, advantages: Tensor, kl: float | None, seconds: float) -> None:
        """Write what align writes of a rollout.

        Args:
            step: Optimizer steps taken.
            rewards: [C] what TRL compares, before any KL.
            advantages: [C] what it made of that.
            kl: Per completion, in nats; None where TRL does not compute it.
            seconds: That the rollout took.
        """
        assert self.number is not None
        settings, length = self.settings, torch.tensor([len(each.ids) for each in self.drawn])
        asked = [self.prompts[i] for i in self.schedule.asked(self.number)]
        ended, of_prompt = torch.tensor(self.scores.ended), rewards.view(len(asked), -1)
        metrics = {
            "rollout/score": self.scores.sums.mean(),
            "rollout/reward": rewards.mean(),
            "rollout/length": length.float().mean(),
            "rollout/ended": ended.float().mean(),
            "rollout/no_spread": (of_prompt.amax(1) == of_prompt.amin(1)).float().mean(),
            **{f"score/{column}": self.scores.found[column].mean() for column in self.scores.columns},
        }
        told = {"rollout/number": float(self.number)} | {name: float(value) for name, value in metrics.items()}
        pull: float = getattr(settings, "pull", 0.0)
        if kl is not None:
            told |= {"rollout/kl": kl} | ({"rollout/beta": pull} if isinstance(settings, PenalisedKL) else {})
        told |= {"rollout/seconds": seconds, "rollout/tokens_per_second": float(length.sum()) / max(seconds, 1e-9)}
        self.metrics.append({"step": step, **told})
        prompt = torch.arange(len(asked)).repeat_interleave(settings.completions)
        rollout = Rollout(rewards, prompt, length, ended | (settings.missing_eos != "drop"), beta=pull)
        made = Advantages(advantages.repeat_interleave(length))
        ids, rows = [p.prompt_ids for p in asked], [p.row for p in asked]
        completions = [each.ids for each in self.drawn]
        self.kept.show(
            Buffer(self.number, step, ids, rows, completions, ended.tolist(), rollout, made, Progress(pull), told)
        )


def on_rollouts(parent: Any, watch: Watch, rollouts: Rollouts) -> Any:
    """A trainer of TRL that takes prompts, completions and the order of its updates from align."""

    class Peer(watched(parent, watch)):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> RolloutOrder:
            return RolloutOrder(rollouts.schedule, self.num_generations, self.args.gradient_accumulation_steps)

        def _tokenize_prompts(self, prompts: list[int]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [rollouts.prompts[i].prompt_ids for i in prompts], None, {}

        def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
            ids = rollouts.draw(self.state.global_step)
            return (ids, None) if self._name == "GRPO" else ids

        def _calculate_rewards(self, *args: Any) -> Tensor:
            found: Tensor = super()._calculate_rewards(*args)
            self.rewards = (found * self.reward_weights.to(found.device)).nansum(1)
            if (bounds := getattr(self, "reward_clip_range", None)) is not None:
                self.rewards = self.rewards.clamp(*bounds)
            return found

        def _generate_and_score_completions(self, inputs: list[dict[str, int]]) -> dict[str, Tensor]:
            began, step = time.monotonic(), self.state.global_step
            made: dict[str, Tensor] = super()._generate_and_score_completions(inputs)
            kl, seconds = self._kl(made), time.monotonic() - began
            rollouts.tell(step, self.rewards.cpu(), made["advantages"].cpu(), kl, seconds)
            return made

        def _kl(self, made: Mapping[str, Tensor]) -> float | None:
            """Per completion, in nats; None where TRL runs no reference, or not over all completions."""
            if self.beta == 0 or self.mask_truncated_completions:
                return None
            mask, drawn = made["completion_mask"], rollouts.drawn
            if "ref_per_token_logps" not in made:  # RLOO gives away the mean over tokens alone
                mean: float = self._metrics["train"]["kl"][-1]
                return mean * float(mask.sum()) / len(drawn)
            reference = float((made["ref_per_token_logps"] * mask).sum())
            return (sum(sum(each.logps) for each in drawn) - reference) / len(drawn)

        def _prepare_inputs(self, generation_batch: list[dict[str, int]]) -> dict[str, Tensor]:
            """This forward pass's part of the rollout; TRL would deal its completions out at random."""
            step, args = self.state.global_step, self.args
            if rollouts.missing(step):
                self.made = self._generate_and_score_completions(generation_batch)
            places = rollouts.of_step(step)
            first = self._step % args.gradient_accumulation_steps * args.per_device_train_batch_size
            own = places[first : first + args.per_device_train_batch_size]
            inputs = {name: tensor[own] if tensor.ndim else tensor for name, tensor in self.made.items()}
            if "num_items_in_batch" in inputs:
                # Tokens of the rollout, of which TRL takes a step's share to be the same for every step: it is told
                # what it would have to be for that share to be the step's own tokens.
                updates = args.steps_per_generation // args.gradient_accumulation_steps
                inputs["num_items_in_batch"] = self.made["completion_mask"][places].sum() * updates
            return inputs

    return Peer
