"""What a stage on rollouts has beside its policy: prompts, the seats of reference, reward model and critic, scorers."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from align.artifacts.store import Store
from align.data import ChatEncoder, Completion, DataReport, Example, PromptExample, load_examples, load_prompts
from align.data.records import Conversation, Prompt
from align.errors import DataError, RecipeError
from align.logps import last_rewards
from align.methods import Method, get_method
from align.methods.ppo import PPO
from align.models.policies import locate
from align.models.rewards import load_reward
from align.models.roles import RoleModel
from align.models.tokenizer import load_tokenizer
from align.scoring import labels
from align.spec.job import Job
from align.spec.online import RolloutStage
from align.spec.scored import REWARD
from align.stages import start
from align.stages.material import Material
from align.stages.scorers import scorers_of
from align.training.guards import together
from align.training.online import Judges, Online
from align.training.passes import run_passes
from align.training.rollout_step import CRITIC, RolloutStep
from align.training.schedule import RolloutSchedule
from align.types import Batch, Needs

logger = logging.getLogger(__name__)


def read_prompts(
    job: Job, settings: RolloutStage, tokenizer: Any, positions: int | None, quarantine: Path | None
) -> tuple[list[PromptExample], DataReport]:
    """The prompts that leave room for a completion.

    Raises:
        RecipeError: The settings leave no room at all.
        DataError: No prompt is left.
    """
    new = settings.generation.max_new_tokens
    room = min(settings.train.max_tokens, positions or settings.train.max_tokens) - new
    if room < 1:
        raise RecipeError(
            f"{new} new tokens leave no room for a prompt in {room + new} tokens",
            where=f"stages.{job.stage}.generation.max_new_tokens",
            fix="set it lower, or train.max_tokens higher",
        )
    source = job.data[settings.prompts]
    return load_prompts(source, tokenizer=tokenizer, max_tokens=room, folder=Path(job.folder), quarantine=quarantine)


def read_texts(job: Job, settings: RolloutStage, tokenizer: Any) -> tuple[list[Example], dict[str, DataReport]]:
    """What PPO-ptx mixes in."""
    if not isinstance(settings, PPO) or settings.ptx is None:
        return [], {}
    texts, report = load_examples(
        job.data[settings.ptx],
        batch=Batch.TOKENS,
        tokenizer=tokenizer,
        max_tokens=settings.train.max_tokens,
        folder=Path(job.folder),
    )
    return texts, {settings.ptx: report}


def shares_base(job: Job, settings: RolloutStage, store: Store, begin: start.Start) -> bool:
    """Whether the reward model is an adapter on the base that the policy stands on, loaded alike."""
    assert job.model is not None
    if settings.reward is None:
        return False
    source = locate(store, job.inputs[settings.reward], "reward")
    own = (begin.base, begin.revision, job.model.quantization)
    if job.model.adapter == "none" or job.model.merge_parent:
        return False  # the base moves, or is another one
    return source.adapter is not None and (source.base, source.revision, source.model.quantization) == own


class OwnReward:
    """A reward model with a base of its own: a second copy, which the plan tells.

    Args:
        model: Its one role is `reward`.
        tokenizer: Its tokenizer.
        policy_tokenizer: The policy's; ids are handed on where both split text alike.
        pack_tokens: Token budget of one forward pass.
    """

    def __init__(self, model: RoleModel, tokenizer: Any, policy_tokenizer: Any, pack_tokens: int) -> None:
        self.model, self.pack_tokens = model, pack_tokens
        self.tokenizer, self.policy_tokenizer = tokenizer, policy_tokenizer
        self.positions: int = getattr(model.config.get_text_config(), "max_position_embeddings", 2**20)
        alike = tokenizer.get_vocab() == policy_tokenizer.get_vocab()
        alike = alike and tokenizer.chat_template == policy_tokenizer.chat_template
        self.encoder = None if alike else ChatEncoder(tokenizer, self.positions)
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        control = {token for token in (*added, *tokenizer.all_special_tokens) if len(token) > 2}
        self._control = re.compile("|".join(re.escape(t) for t in sorted(control, key=len, reverse=True)) or r"(?!)")

    def check(self, prompts: Sequence[PromptExample], new_tokens: int) -> None:
        """Refuse prompts that it cannot read, before anything is drawn for them.

        Raises:
            DataError: There is one.
        """
        why: str | None = None
        outcomes: Sequence[Any] = prompts
        if self.encoder is not None:
            outcomes = self.encoder.encode_many([Prompt(p.row, p.messages) for p in prompts])
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            if isinstance(outcome, Exception):
                why = str(outcome)
            elif len(outcome.prompt_ids) + new_tokens > self.positions:
                why = f"its {len(outcome.prompt_ids)} tokens and {new_tokens} new ones are over {self.positions}"
            if why is not None:
                raise DataError(
                    f"the reward model, which has a base of its own, cannot read the prompt in row {prompt.row}: {why}",
                    fix="leave such rows out, or name a reward model on the policy's own base",
                )

    def rewards(
        self, prompts: Sequence[PromptExample], completions: Sequence[Sequence[list[int]]]
    ) -> list[list[float]]:
        """The reward of every completion of every prompt; all ranks together."""
        examples = together(partial(self._examples, prompts, completions))
        (found,) = run_passes(self.model, [(REWARD, last_rewards)], examples, self.pack_tokens)
        flat = iter(float(each) for each in found)
        return [[next(flat) for _ in each] for each in completions]

    def _examples(self, prompts: Sequence[PromptExample], completions: Sequence[Sequence[list[int]]]) -> list[Example]:
        return [self._example(p, ids) for p, each in zip(prompts, completions, strict=True) for ids in each]

    def _example(self, prompt: PromptExample, ids: list[int]) -> Example:
        if self.encoder is None:
            return Example(prompt.row, prompt.prompt_ids, (Completion(ids, [True] * len(ids), False),), 1.0)
        text = self.policy_tokenizer.decode(ids, skip_special_tokens=True)
        # To the policy they are text like any other, and it could write the end of its turn into an answer.
        while self._control.search(text):
            text = self._control.sub("", text)
        record = Conversation(prompt.row, [*prompt.messages, {"role": "assistant", "content": text or " "}])
        (outcome,) = self.encoder.encode_many([record])
        if isinstance(outcome, Example):
            return outcome
        # The template would write it in other words; whatever the policy says, it may not stop the run.
        own = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        completion = Completion(own, [True] * len(own), False)
        return Example(prompt.row, self.encoder.prompt(list(prompt.messages)), (completion,), 1.0)


def load_own_reward(job: Job, settings: RolloutStage, store: Store, tokenizer: Any) -> OwnReward | None:
    """The reward model where it does not share the policy's base; before ZeRO-3 could take it apart."""
    begin = start.of_policy(job, settings, store)
    if settings.reward is None or shares_base(job, settings, store, begin):
        return None
    fingerprint = job.inputs[settings.reward]
    model, _ = load_reward(store, fingerprint)
    own = load_tokenizer(locate(store, fingerprint, "reward").folder)
    return OwnReward(model, own, tokenizer, settings.train.pack_tokens)


def add_seats(job: Job, settings: RolloutStage, method: Method, store: Store, roles: RoleModel, own: bool) -> None:
    """Put reward model and critic onto the policy's base.

    Args:
        job: The stage.
        settings: Its settings.
        method: Its method.
        store: Where the reward model is.
        roles: The model, with its policy.
        own: Whether the reward model has a base of its own.
    """
    shared = None if settings.reward is None or own else job.inputs[settings.reward]
    if shared is not None:
        load_reward(store, shared, REWARD, onto=roles)
    if Needs.VALUES not in method.needs:
        return
    if shared is not None and isinstance(settings, PPO) and settings.critic_start == "reward":
        load_reward(store, shared, CRITIC, onto=roles, trainable=True)
    else:
        roles.add_adapter(CRITIC, copy_of="policy", trainable=True)
        roles.add_head(CRITIC).reset_parameters()


def seat(
    job: Job,
    settings: RolloutStage,
    store: Store,
    roles: RoleModel,
    material: Material,
    schedule: Any,
    reward: OwnReward | None,
    report: Any,
) -> dict[str, Any]:
    """Give every role its seat on the model, and the trainer what it needs beside a model.

    Args:
        job: The stage.
        settings: Its settings.
        store: Where the reward model is.
        roles: The model, with its policy and reference.
        material: Prompts, and texts to mix in.
        schedule: The `RolloutSchedule`.
        reward: A reward model with a base of its own.
        report: Told what is being done.

    Returns:
        Arguments of the trainer.
    """
    assert isinstance(schedule, RolloutSchedule)
    method = get_method(job.kind)
    if reward is not None:
        reward.check(material.prompts, settings.generation.max_new_tokens)
    add_seats(job, settings, method, store, roles, own=reward is not None)
    online = Online(
        settings,
        method,
        prompts=material.prompts,
        judges=_judges(job, settings, reward),
        schedule=schedule,
        tokenizer=material.tokenizer,
        reference=getattr(settings, "reference", None) is not None,
        texts=material.examples,
        synced=job.launch.deepspeed == "zero3",
        work=Path(job.work),
        report=report,
    )
    rate = settings.critic_learning_rate if isinstance(settings, PPO) else None
    step = RolloutStep(method, settings, settings.train.pack_tokens)
    return {"step": step, "online": online, "learning_rates": {CRITIC: rate} if rate else {}}


def _judges(job: Job, settings: RolloutStage, reward: OwnReward | None) -> Judges:
    scorers = scorers_of(job, settings)
    columns = {name: name if label == REWARD else label for name, label in labels(scorers).items()}
    weights = {columns[name]: settings.weights.get(name, 1.0) for name in scorers}
    named = {columns[name]: (name, scorer) for name, scorer in scorers.items()}
    if settings.reward is None:
        return Judges(named, weights)
    return Judges(named, weights | {REWARD: settings.weights.get(REWARD, 1.0)}, reward or "shared")
