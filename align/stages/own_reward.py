"""A reward model that does not share the policy's base: a second copy, which the plan tells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from align.artifacts.store import Store
from align.data import ChatEncoder, Completion, Example, PromptExample
from align.data.records import Conversation, Prompt
from align.errors import DataError
from align.logps import last_rewards
from align.models.policies import locate
from align.models.rewards import load_reward
from align.models.roles import RoleModel
from align.models.tokenizer import load_tokenizer
from align.spec.job import Job
from align.spec.online import RolloutStage
from align.spec.scored import REWARD
from align.stages import start
from align.training.guards import together
from align.training.passes import run_passes


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
