"""The passes of a rollout: prompts into the cache, and one token for every row.

A prompt's last token is the first one that its rows are fed, so every row begins like it goes on: a prompt needs no
logits, however many rows complete it and whenever they begin. All that a step reads and writes lies on the device and
stays where it is. Shape letters: B rows, S slots for prompts, R new tokens at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from align.rollout.graphs import StepGraphs
from align.rollout.kv import KV, Prompts
from align.rollout.sampling import Sampler

GRAPH_WIDTH = 64
"""A graph is made for own tokens in steps of this."""
CPU_ROWS, CPU_WIDTH = 4, 32
"""What rows and widths are multiples of on a CPU: products of one to three rows, and those whose last columns do not
fill a vector, add up in another order than larger ones. So what is drawn does not depend on what is drawn beside it."""


class Decoder:
    """Rows that are completed side by side.

    Args:
        causal_lm: The model as its role sees it, with `rollout_attention` on.
        sampler: Draws tokens.
        ends: Tokens that end a completion.
        rows: B.
        new_tokens: R.
        slots: S; 0 where each prompt has one row.
        prompt_tokens: Tokens of the longest prompt.
        pad_id: Any token.
        graphs: Capture steps as CUDA graphs.
    """

    def __init__(
        self,
        causal_lm: Any,
        sampler: Sampler,
        ends: Sequence[int],
        *,
        rows: int,
        new_tokens: int,
        slots: int,
        prompt_tokens: int,
        pad_id: int,
        graphs: bool = False,
    ) -> None:
        self.causal_lm, self.sampler, self.pad_id = causal_lm, sampler, pad_id
        self.device = next(causal_lm.parameters()).device
        self.rows, self.new_tokens, self.slots = rows, new_tokens, slots
        self.prompt_keys = self._wide(prompt_tokens - 1)
        row_tokens = self._wide(new_tokens if slots else new_tokens + prompt_tokens - 1)
        self.kv = KV(rows, row_tokens, slots, self.prompt_keys, self.device)
        self.graphs = StepGraphs() if graphs else None
        self.ends = torch.tensor(sorted(ends), device=self.device)
        self.unread_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        zeros = lambda *shape, dtype=torch.long: torch.zeros(*shape, dtype=dtype, device=self.device)  # noqa: E731
        self.token, self.length, self.before, self.alive = (*(zeros(rows) for _ in range(3)), zeros(rows, dtype=bool))
        """[B] last token, tokens drawn, tokens before the first one that is fed, and whether it goes on."""
        self.prompts: Prompts | None = None
        self.tokens, self.logps = zeros(rows, new_tokens), zeros(rows, new_tokens, dtype=torch.float32)
        """[B, R] what was drawn."""
        self.draws = None if sampler.greedy else zeros(rows, new_tokens, dtype=torch.float64)

    def _wide(self, width: int) -> int:
        """A width, rounded up on a CPU."""
        return width if self.device.type == "cuda" else -(-width // CPU_WIDTH) * CPU_WIDTH

    # Rows and prompts ------------------------------------------------------------------------------------------------

    def prefill(self, prompts: Sequence[Sequence[int]], places: Sequence[int]) -> None:
        """Compute all but the last token of some prompts, which have two or more, in one pass.

        Args:
            prompts: Token ids.
            places: The slot of each, or its row.
        """
        longest = max(map(len, prompts)) - 1
        width = self._wide(longest)
        input_ids = torch.tensor([[*p[:-1], *[self.pad_id] * (width + 1 - len(p))] for p in prompts])
        self.kv.prefill(torch.tensor(places, device=self.device))
        positions = torch.arange(width, device=self.device).clamp(max=longest - 1)  # of those that a model has
        self._forward(input_ids.to(self.device), positions.expand(len(prompts), -1))

    def idle(self) -> None:
        """A pass for nothing, while other ranks need this one."""
        self.kv.nothing()
        self._forward(self.token[:1, None], self.length[:1, None] * 0)

    def place_rows(self, rows: Sequence[int], prompts: Sequence[Sequence[int]], draws: Sequence[Tensor] | None) -> None:
        """Begin rows: each is fed its prompt's last token next."""
        index = torch.tensor(rows, device=self.device)
        self.token[index] = torch.tensor([p[-1] for p in prompts], device=self.device)
        self.before[index] = torch.tensor([len(p) - 1 for p in prompts], device=self.device)
        self.length[index] = 0
        self.alive[index] = True
        if self.draws is not None and draws is not None:
            self.draws[index] = torch.stack([row[: self.new_tokens] for row in draws]).to(self.device)

    def rest(self, rows: Sequence[int]) -> None:
        """Draw no more for some rows, which have not ended by themselves."""
        if rows:
            self.alive[torch.tensor(rows, device=self.device)] = False

    def drawn(self, rows: Sequence[int]) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probabilities of some rows; what lies behind a row's last token is left from another."""
        index = torch.tensor(rows, device=self.device)
        return self.tokens.index_select(0, index).tolist(), self.logps.index_select(0, index).tolist()

    def arrange(self, slot_of_row: Sequence[int | None], keys_in_slot: Sequence[int], most: int) -> None:
        """Say which prompt each row completes, where prompts have slots.

        Args:
            slot_of_row: For each row, or None if it rests.
            keys_in_slot: For each slot, prompt tokens that are kept in it.
            most: Rows that a prompt has at most.
        """
        if not self.slots:
            return
        in_use = [slot for slot in slot_of_row if slot is not None]
        used, width = self.slots, self.prompt_keys
        if self.graphs is None:  # graphs want the same shapes in every step
            used = max(in_use, default=0) + 1
            width = self._wide(max((keys_in_slot[slot] for slot in in_use), default=0))
            if self.device.type == "cuda":
                most = max(Counter(in_use).values(), default=1)
        members, place, counts = [[0] * most for _ in range(used)], [0] * self.rows, [0] * used
        for row, slot in enumerate(slot_of_row):
            if slot is not None:
                members[slot][counts[slot]] = row
                place[row] = slot * most + counts[slot]
                counts[slot] += 1
        new = [torch.tensor(x, device=self.device) for x in (keys_in_slot[:used], members, place)]
        if self.graphs is None or self.prompts is None:
            self.prompts = Prompts(new[0], width, new[1], new[2])
        else:
            for old, tensor in zip((self.prompts.lengths, self.prompts.members, self.prompts.place), new, strict=True):
                old.copy_(tensor)

    def take(self, rows: Sequence[int], slots: Sequence[int]) -> None:
        """Leave only some rows and slots; `arrange` has to follow."""
        kept = torch.tensor(rows, device=self.device)
        self.kv.take(kept, torch.tensor(slots, device=self.device) if self.slots else None)
        for name in ("token", "length", "before", "alive", "tokens", "logps", "draws"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, kept))
        self.rows, self.slots, self.prompts = len(rows), len(slots) if self.slots else 0, None
        if self.graphs is not None:
            self.graphs = StepGraphs()

    # A step ----------------------------------------------------------------------------------------------------------

    def step(self, width: int) -> list[bool]:
        """Draw a token for every row.

        Args:
            width: Most tokens that any row has with this step's; the prompt's count where it has no slot.

        Returns:
            For each row whether it has just ended, by a token or at its limit.
        """
        if self.graphs is None:
            return self._step(width).tolist()
        width = min(-(-width // GRAPH_WIDTH) * GRAPH_WIDTH, self.kv.sizes["own"][1])
        run: Callable[[], Tensor] = lambda: self._step(width)  # noqa: E731
        return self.graphs(width, run).tolist()

    def _step(self, width: int) -> Tensor:
        column = self.length.clamp(max=self.new_tokens - 1)[:, None]  # a row that rests has used up its places
        logits = self.feed(width)
        draws = None if self.draws is None else self.draws.gather(1, column)[:, 0]
        token, logps = self.sampler(logits, draws)
        self.token.copy_(token)
        self.tokens.scatter_(1, column, token[:, None])
        self.logps.scatter_(1, column, logps[:, None])
        self.length.add_(self.alive)
        ended = (token[:, None] == self.ends).any(1) | (self.length >= self.new_tokens)
        ended &= self.alive
        self.alive.logical_and_(~ended)
        return ended

    def feed(self, width: int) -> Tensor:
        """[B, V] logits after the last token of every row, which is appended to the cache."""
        drawn = self.length.clamp(max=self.new_tokens - 1)
        position = self.before + drawn
        self.kv.decode(drawn if self.slots else position, self._wide(width), self.prompts)
        return self._forward(self.token[:, None], position[:, None])

    def follow(self, tokens: Tensor, origin: Sequence[int], width: int) -> None:
        """Go on with other tokens than this class draws, each row from the cache of another one of its prompt.

        Args:
            tokens: [B] last tokens.
            origin: For each row the one that it goes on from.
            width: As `feed` had it.
        """
        self.token.copy_(tokens)
        self.length.add_(1)
        if list(origin) != list(range(self.rows)):
            self.kv.reorder(torch.tensor(origin, device=self.device), width)

    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[n, V] logits after the last token of each row.

        Body and head are called once each in every pass, needed or not: under ZeRO-3 each call gathers weights, and
        ranks have to gather in step.
        """
        hidden = self.causal_lm.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=self.unread_mask,  # keeps transformers from making one
            past_key_values=self.kv,
            use_cache=True,
            rollout=self.kv,
        ).last_hidden_state
        return self.causal_lm.lm_head(hidden[:, -1])
