"""Beam search, and diverse beam search: groups of beams that are kept apart.

At every step groups choose one after the other, and a token costs a group `penalty` for each time that earlier groups
chose it at this step. With one beam per group this is greedy decoding with a Hamming penalty, as RRHF samples.

*Source*: arXiv:1610.02424, algorithm 1; transformers' beam search for what becomes of beams that have ended (a length
penalty of 1: hypotheses compete by their mean score per token).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.rollout.decoder import Decoder
from align.rollout.engine import Sampled, Synced, Tell
from align.rollout.kv import rollout_attention
from align.rollout.proof import why_not
from align.rollout.request import Found, Request, drawing
from align.rollout.sampling import Sampler
from align.spec.stages import GenerationSettings

logger = logging.getLogger(__name__)

NEVER = -1e9
"""The score of a beam that is there in number only."""


def beam(
    roles: Any,
    role: str,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    beams: int,
    groups: int = 1,
    penalty: float = 0.0,
    tell: Tell | None = None,
    synced: Synced | None = None,
) -> list[list[Sampled]]:
    """Search the likeliest completions of each prompt. Nothing is drawn: `top_p`, `top_k` and `seed` are not read.

    Args:
        roles: A `RoleModel`, bare or wrapped by DDP or DeepSpeed.
        role: Which of its roles speaks.
        prompts: Token ids, generation prompt included.
        settings: Length, stop strings, how many beams are computed side by side, and the temperature of the scores (0
            is as 1); it changes what a penalty weighs.
        tokenizer: Decides padding and the ends of turns.
        beams: Beams per prompt, and completions that are returned.
        groups: In how many groups of equal size.
        penalty: Nats that a token costs for each beam of an earlier group that chose it at the same step.
        tell: Called with completions done and in all.
        synced: See `align.rollout.local.sample`.

    Returns:
        For each prompt its completions: group by group, the best of a group first. Log-probabilities are at the
        temperature and without penalty.

    Raises:
        RecipeError: If a prompt and its completion would not fit into the model's positions.
    """
    if beams % groups:
        raise ValueError(f"{beams} beams make no {groups} groups of equal size")
    request = Request(prompts, settings, tokenizer, beams, tell=tell, synced=synced)
    request.check(getattr(roles, "module", roles).config)
    with drawing(roles):
        return roles(role, _search, request, groups, penalty)


def _search(causal_lm: Any, request: Request, groups: int, penalty: float, *_: Any) -> list[list[Sampled]]:
    """Runs inside `RoleModel.forward`."""
    reason = why_not(causal_lm, request.longest + request.settings.max_new_tokens, request.synced)
    if reason is not None:
        logger.warning("beams are computed anew at every step, without a cache, which is slow: %s", reason)
    found, ends = Found(request), request.ends(causal_lm)
    order = sorted(range(len(request.prompts)), key=lambda i: (-len(request.prompts[i]), i))
    size = max(1, request.settings.batch_size // request.completions)
    with nullcontext() if reason else rollout_attention(causal_lm.model):
        passes = (_Anew if reason else _Cached)(causal_lm, request)
        for start in range(0, len(order), size):
            own = order[start : start + size]
            for i, completions in zip(own, _batch(passes, request, own, ends, groups, penalty), strict=True):
                for k, completion in enumerate(completions):
                    found.add(i, k, completion)
            found.tell()
        while request.synced is not None and request.synced(False):
            passes.idle()
    return found.rows


@dataclass
class _Beam:
    """One hypothesis: its tokens, their log-probabilities, and the sum of its scores, penalties included."""

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    score: float = 0.0
    ended: bool = False

    def then(self, token: int, logp: float, score: float, ended: bool = False) -> _Beam:
        return _Beam([*self.ids, token], [*self.logps, logp], score, ended)

    @property
    def mean(self) -> float:
        return self.score / len(self.ids)


class _Group:
    """The beams of one prompt that compete with each other.

    Args:
        size: How many.
        limit: Tokens of a completion at most.
        ends: Says of some beams which have ended by themselves.
    """

    def __init__(self, size: int, limit: int, ends: Callable[[Sequence[_Beam]], list[bool]]) -> None:
        self.size, self.limit, self.ends = size, limit, ends
        self.running = [_Beam(score=0.0 if j == 0 else NEVER) for j in range(size)]
        self.done: list[_Beam] = []
        self.open = True

    def choose(self, candidates: Sequence[tuple[float, float, int, int]]) -> list[tuple[int, int]]:
        """Go one token on.

        Args:
            candidates: (score, log-probability, beam, token), best first.

        Returns:
            (beam that it goes on from, token) of every beam that runs on.
        """
        made = [self.running[j].then(token, logp, score) for score, logp, j, token in candidates]
        by_itself = self.ends(made)
        over = [end or len(each.ids) >= self.limit for end, each in zip(by_itself, made, strict=True)]
        for each, end, last in list(zip(made, by_itself, over, strict=True))[: self.size]:
            if last:
                each.ended = end
                self.done.append(each)
        self.done = sorted(self.done, key=lambda each: -each.mean)[: self.size]
        kept = sorted(range(len(made)), key=lambda c: (over[c], c))[: self.size]
        self.running = [replace(made[c], score=NEVER) if over[c] else made[c] for c in kept]
        full = len(self.done) == self.size
        # A single beam is greedy search, which ends with its first end.
        self.open = not full or (self.size > 1 and self.running[0].mean > self.done[-1].mean)
        return [(candidates[c][2], candidates[c][3]) for c in kept]


def _batch(
    passes: _Cached | _Anew, request: Request, own: Sequence[int], ends: set[int], groups: int, penalty: float
) -> list[list[Sampled]]:
    """The completions of some prompts, all of whose beams are computed side by side."""
    beams, limit, temperature = request.completions, request.settings.max_new_tokens, request.settings.temperature or 1
    size = beams // groups
    ended = lambda made: _ended(made, ends, request)  # noqa: E731
    searches = [[_Group(size, limit, ended) for _ in range(groups)] for _ in own]
    logits = passes.first([request.prompts[i] for i in own], beams)
    while True:
        logps = (logits.float() / temperature).log_softmax(-1).view(len(own), groups, size, -1)
        chosen = torch.zeros_like(logps[:, 0, 0])
        origin, tokens = list(range(len(own) * beams)), [0] * (len(own) * beams)
        for g in range(groups):
            column = [search[g] for search in searches]
            candidates = _candidates(column, logps[:, g], chosen * penalty, (1 + max(1, len(ends))) * size)
            for p, (group, best) in enumerate(zip(column, candidates, strict=True)):
                if not group.open:
                    continue
                first = p * beams + g * size
                taken = torch.tensor([token for *_, token in best[:size]], device=chosen.device)
                chosen[p].index_add_(0, taken, torch.ones_like(taken, dtype=chosen.dtype))
                for j, (beam_before, token) in enumerate(group.choose(best)):
                    origin[first + j], tokens[first + j] = first + beam_before, token
        if not any(group.open for search in searches for group in search):
            break
        logits = passes.next(tokens, origin)
    return [
        [Sampled(each.ids, each.logps, each.ended) for group in search for each in group.done] for search in searches
    ]


def _candidates(
    column: Sequence[_Group], logps: Tensor, cost: Tensor, most: int
) -> list[list[tuple[float, float, int, int]]]:
    """For each prompt the best ways to go on with one group: (score, log-probability, beam, token), best first.

    Args:
        column: The group of each prompt.
        logps: [n, beams of the group, V].
        cost: [n, V] what each token costs.
        most: How many: enough to go on with when the best ones all end.
    """
    before = torch.tensor([[each.score for each in group.running] for group in column], device=logps.device)
    scores = (logps - cost[:, None] + before[:, :, None]).flatten(1)
    best, index = scores.topk(min(most, scores.shape[1]))
    own = logps.flatten(1).gather(1, index)
    beam_of, token = index // logps.shape[-1], index % logps.shape[-1]
    rows = zip(best.tolist(), own.tolist(), beam_of.tolist(), token.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


def _ended(made: Sequence[_Beam], ends: set[int], request: Request) -> list[bool]:
    reached = request.stops.reached([each.ids for each in made])
    return [each.ids[-1] in ends or stop for each, stop in zip(made, reached, strict=True)]


class _Cached:
    """Passes with align's own cache: prompts once, beams beside them."""

    def __init__(self, causal_lm: Any, request: Request) -> None:
        self.causal_lm, self.request = causal_lm, request
        self.decoder: Decoder | None = None

    def first(self, prompts: Sequence[list[int]], beams: int) -> Tensor:
        """[prompts * beams, V] logits after the prompts."""
        slots = len(prompts) if beams > 1 else 0
        self.decoder = decoder = self._decoder(len(prompts) * beams, slots, max(map(len, prompts)))
        longer = [i for i, prompt in enumerate(prompts) if len(prompt) > 1]
        if longer:
            _in_step(self.request)
            decoder.prefill([prompts[i] for i in longer], longer)
        of_row = [i for i in range(len(prompts)) for _ in range(beams)]
        decoder.place_rows(range(len(of_row)), [prompts[i] for i in of_row], None)
        decoder.arrange(of_row, [len(prompt) - 1 for prompt in prompts], beams)
        self.width = 1 if slots else max(map(len, prompts))
        return self._feed()

    def next(self, tokens: Sequence[int], origin: Sequence[int]) -> Tensor:
        """The same after one more token of each beam, which goes on from another one."""
        assert self.decoder is not None
        self.decoder.follow(torch.tensor(tokens, device=self.decoder.device), origin, self.width)
        self.width += 1
        return self._feed()

    def idle(self) -> None:
        """A pass for nothing."""
        self.decoder = self.decoder or self._decoder(1, 0, 1)
        self.decoder.idle()

    def _feed(self) -> Tensor:
        assert self.decoder is not None
        _in_step(self.request)
        return self.decoder.feed(self.width)

    def _decoder(self, rows: int, slots: int, prompt_tokens: int) -> Decoder:
        return Decoder(
            self.causal_lm,
            Sampler(GenerationSettings(temperature=0.0)),
            (),
            rows=rows,
            new_tokens=self.request.settings.max_new_tokens,
            slots=slots,
            prompt_tokens=prompt_tokens,
            pad_id=self.request.tokenizer.pad_token_id,
        )


class _Anew:
    """Passes over whole sequences, for models whose cache only transformers knows."""

    def __init__(self, causal_lm: Any, request: Request) -> None:
        self.causal_lm, self.request = causal_lm, request
        self.device = next(causal_lm.parameters()).device
        self.rows: list[list[int]] = []

    def first(self, prompts: Sequence[list[int]], beams: int) -> Tensor:
        """[prompts * beams, V] logits after the prompts."""
        self.rows = [list(prompt) for prompt in prompts for _ in range(beams)]
        return self._last_logits()

    def next(self, tokens: Sequence[int], origin: Sequence[int]) -> Tensor:
        """The same after one more token of each beam, which goes on from another one."""
        self.rows = [[*self.rows[row], token] for row, token in zip(origin, tokens, strict=True)]
        return self._last_logits()

    def idle(self) -> None:
        """A pass for nothing."""
        self.causal_lm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)

    def _last_logits(self) -> Tensor:
        _in_step(self.request)
        width, pad_id = max(map(len, self.rows)), self.request.tokenizer.pad_token_id
        ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in self.rows], device=self.device)
        last = torch.tensor([len(row) - 1 for row in self.rows], device=self.device)
        logits = self.causal_lm(input_ids=ids, use_cache=False).logits
        return logits[torch.arange(len(last), device=self.device), last]


def _in_step(request: Request) -> None:
    """Before every pass."""
    if request.synced is not None:
        request.synced(True)
