"""Which completion is drawn in which row, and when: rows that have ended are filled again from the queue.

Long prompts come first, so that prompts side by side are of like length and the last rows are the cheap ones. Prompts
wait until several rows are free, for one pass over several costs little more than over one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.rollout.decoder import CPU_ROWS, Decoder
from align.rollout.engine import Sampled
from align.rollout.request import Found, Request
from align.rollout.sampling import Sampler

PREFILL_TOKENS = 8192
"""Most tokens of prompts, padding included, that are computed in one pass; one prompt may be longer."""
FREE_SHARE = 8
"""New prompts are computed once one row in this many is free."""
SHRINK, SHRINK_GRAPHS = 0.75, 0.25
"""Rows are closed up when no more than this share of them goes on and none is waiting; graphs are made anew for it."""


@dataclass
class Row:
    """A completion that is being drawn.

    Attributes:
        prompt: Its place in the list.
        completion: Which of the prompt's.
        slot: Where the prompt's keys are; the row itself where prompts have no slots.
        since: The step before its first token.
        ids: What was drawn; kept only where stop strings are looked for.
    """

    prompt: int
    completion: int
    slot: int
    since: int
    ids: list[int] = field(default_factory=list)


class Loop:
    """Draws all completions of a request.

    Args:
        causal_lm: The model as its role sees it, with `rollout_attention` on.
        request: What is asked for.
        rows: Completions side by side at most.
    """

    def __init__(self, causal_lm: Any, request: Request, rows: int) -> None:
        self.request, self.found = request, Found(request)
        self.ends = request.ends(causal_lm)
        order = sorted(range(len(request.prompts)), key=lambda i: (-len(request.prompts[i]), i))
        self.queue = deque((i, k) for i in order for k in range(request.completions))
        self.left = [request.completions] * len(request.prompts)
        """Completions of each prompt that are not done."""
        device = next(causal_lm.parameters()).device
        self.together = 1 if device.type == "cuda" else CPU_ROWS
        """What the number of rows is a multiple of."""
        rows = self._rows(min(rows, request.total))
        # A prompt stays until its last completion is done: about twice as many are there as rows would need.
        slots = 0
        if request.completions > 1:
            slots = max(1, min(rows, len(request.prompts), 4 * -(-rows // request.completions)))
        self.decoder = Decoder(
            causal_lm,
            Sampler(request.settings),
            sorted(self.ends),
            rows=rows,
            new_tokens=request.settings.max_new_tokens,
            slots=slots,
            prompt_tokens=request.longest,
            pad_id=request.tokenizer.pad_token_id,
            graphs=device.type == "cuda" and request.synced is None,
        )
        self.rows: list[Row | None] = [None] * rows
        self.keys: list[int] = [0] * (slots or rows)
        """Prompt tokens in each slot, or row."""
        self.free_slots = set(range(slots or rows))
        self.slot_of: dict[int, int] = {}
        self.steps = self.live = 0
        self.start = 0
        """Steps by which the longest row began before the first one, its prompt's tokens included."""

    def run(self) -> list[list[Sampled]]:
        """For each prompt its completions."""
        while self._going():
            if not self.queue and not self.live:
                self.decoder.idle()
            elif not self._admit():
                self._step()
        return self.found.rows

    def _going(self) -> bool:
        own = bool(self.queue or self.live)
        return own if self.request.synced is None else self.request.synced(own)

    def _rows(self, rows: int) -> int:
        return max(1, -(-rows // self.together)) * self.together

    # Beginning -------------------------------------------------------------------------------------------------------

    def _admit(self) -> bool:
        """Fill free rows from the queue; whether that took a pass over prompts."""
        free = [b for b, row in enumerate(self.rows) if row is None] if self.queue else []
        due = len(free) >= min(len(self.queue), max(1, len(self.rows) // FREE_SHARE))
        begun: list[int] = []
        fresh: list[int] = []
        for b in free:
            if not self.queue:
                break
            prompt, completion = self.queue[0]
            if prompt not in self.slot_of:
                width = max(len(self.request.prompts[i]) for i in (*fresh, prompt))
                if not due or not self.free_slots or (fresh and (len(fresh) + 1) * width > PREFILL_TOKENS):
                    break
                self._settle(prompt, b)
                fresh.append(prompt)
            self.queue.popleft()
            self.rows[b] = Row(prompt, completion, self.slot_of[prompt], self.steps)
            begun.append(b)
        if begun:
            self._begin(begun)
        fresh = [prompt for prompt in fresh if len(self.request.prompts[prompt]) > 1]
        if fresh:
            prompts = self.request.prompts
            self.decoder.prefill([prompts[i] for i in fresh], [self.slot_of[i] for i in fresh])
        return bool(fresh)

    def _settle(self, prompt: int, row: int) -> None:
        """Give a prompt a slot; its row is its slot where there are none."""
        slot = min(self.free_slots) if self.decoder.slots else row
        self.free_slots.remove(slot)
        self.slot_of[prompt] = slot
        self.keys[slot] = len(self.request.prompts[prompt]) - 1

    def _begin(self, begun: Sequence[int]) -> None:
        rows = [row for b in begun if (row := self.rows[b]) is not None]
        draws = None
        if self.decoder.draws is not None:
            draws = [self.request.draws(row.prompt, row.completion) for row in rows]
        self.decoder.place_rows(begun, [self.request.prompts[row.prompt] for row in rows], draws)
        self.live += len(begun)
        self._arrange()

    def _arrange(self) -> None:
        slots = [None if row is None else row.slot for row in self.rows]
        self.decoder.arrange(slots, self.keys, self.request.completions)
        self._measure()

    def _measure(self) -> None:
        """How wide the next step has to look."""
        prompt = 0 if self.decoder.slots else 1
        starts = (prompt * self.keys[row.slot] - row.since for row in self.rows if row is not None)
        self.start = max(starts, default=0)

    # Going on --------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        ended = self.decoder.step(self.start + self.steps + 1)
        self.steps += 1
        done = [b for b, end in enumerate(ended) if end] if True in ended else []
        stopped = self._stopped(done) if self.request.stops else []
        if done or stopped:
            self._collect([*done, *stopped], set(stopped))

    def _stopped(self, done: Sequence[int]) -> list[int]:
        """Rows that hold a stop string now, and go on no further."""
        tokens = self.decoder.token.tolist()
        going = [(b, row) for b, row in enumerate(self.rows) if row is not None]
        for b, row in going:
            row.ids.append(tokens[b])
        going = [(b, row) for b, row in going if b not in done or tokens[b] not in self.ends]
        reached = self.request.stops.reached([row.ids for _, row in going])
        return [b for (b, _), stop in zip(going, reached, strict=True) if stop]

    def _collect(self, done: Sequence[int], stopped: set[int]) -> None:
        """Take finished completions out of their rows."""
        done = sorted(set(done))
        drawn = self.decoder.drawn(done)
        self.decoder.rest(sorted(stopped))
        for b, ids, logps in zip(done, *drawn, strict=True):
            row = self.rows[b]
            assert row is not None
            n = self.steps - row.since
            ended = b in stopped or ids[n - 1] in self.ends
            self.found.add(row.prompt, row.completion, Sampled(ids[:n], logps[:n], ended))
            self.rows[b] = None
            self.left[row.prompt] -= 1
            if not self.left[row.prompt]:
                self.free_slots.add(self.slot_of.pop(row.prompt))
        self.live -= len(done)
        self.found.tell()
        self._measure()
        share = SHRINK_GRAPHS if self.decoder.graphs else SHRINK
        if not self.queue and self.live and self._rows(self.live) <= share * len(self.rows):
            self._shrink()

    def _shrink(self) -> None:
        """Close up the rows that go on, and their prompts."""
        kept = [b for b, row in enumerate(self.rows) if row is not None]
        kept += [b for b, row in enumerate(self.rows) if row is None][: self._rows(len(kept)) - len(kept)]
        self.rows = [self.rows[b] for b in kept]
        slots = sorted({row.slot for row in self.rows if row is not None}) if self.decoder.slots else kept
        place = {slot: i for i, slot in enumerate(slots)}
        for row in self.rows:
            if row is not None:
                row.slot = place[row.slot]
        self.decoder.take(kept, slots)
        self.keys = [self.keys[slot] for slot in slots]
        self.free_slots, self.slot_of = set(), {prompt: place[slot] for prompt, slot in self.slot_of.items()}
        self._arrange()
