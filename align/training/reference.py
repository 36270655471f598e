"""Log-probabilities under the reference: computed once, before the first step, for every stage that asks for them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from align.artifacts.lock import Busy
from align.data.chat import Example
from align.errors import TrainingError
from align.logps import Pack, Packing, completion_logps, empty_pack, pack_examples, token_logps
from align.logps.cache import Row, RowCache, asked_for, completion_token_logps, row_keys
from align.training import collectives

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference per token, in nats, that two passes of the same policy may show."""
SHARD_SECONDS = 20.0
"""What a kill costs at most, beside one turn."""
SHARD_ROWS = 8192
BLOCK_PACKS = 4
"""Token budgets that a block of examples fills: large enough to fill its packs, small enough to spread over ranks."""
PACKS_PER_TURN = 2
"""Forward passes of a rank between two meetings of all."""
PATIENCE_SECONDS = 10.0
"""How long a rank waits for another run's lock before it meets the others again; their patience has an end too."""

Tell = Callable[[str], None]


@dataclass
class Cost:
    """What the reference took: wall time, rows that were computed and read, tokens of the computed ones."""

    seconds: float = 0.0
    computed: int = 0
    reused: int = 0
    tokens: int = 0

    def metrics(self) -> dict[str, float]:
        """As `metrics.jsonl` and the manifest have it."""
        found = {"seconds": self.seconds, "computed": self.computed, "reused": self.reused}
        if self.computed:
            found["tokens_per_second"] = self.tokens / max(self.seconds, 1e-9)
        return {f"reference/{name}": value for name, value in found.items()}


@dataclass(frozen=True)
class _Part:
    """An example with those of its completions that are computed with it, and their keys."""

    example: Example
    keys: tuple[bytes, ...]

    @property
    def sizes(self) -> list[int]:
        """Tokens of prompt and completion, per completion."""
        return [len(self.example.prompt_ids) + len(c.ids) for c in self.example.completions]


@dataclass
class _Turn:
    """What a rank computed between two meetings.

    Attributes:
        rows: By key.
        tokens: Of their prompts and completions.
        broken: Rows of the data that have a number which is not finite.
        over: Whether the rank has nothing more to do.
        stop: Whether it was asked to stop.
    """

    rows: dict[bytes, Row] = field(default_factory=dict)
    tokens: int = 0
    broken: list[int] = field(default_factory=list)
    over: bool = False
    stop: bool = False


class References:
    """The reference's log-probabilities of a stage's examples, the same on every rank.

    Every rank makes one and calls its methods together with the others; rank 0 alone reads and writes the cache.

    Args:
        sets: Name of a set (training, validation) -> its examples.
        cache: Rows of the reference that are there already, and where new ones go.
        rows_id: What the rows are, for a plan: noted in the cache once all of them are there.
    """

    def __init__(self, sets: Mapping[str, Sequence[Example]], cache: RowCache, rows_id: str = "") -> None:
        began = time.monotonic()
        self.sets, self.cache, self.rows_id = sets, cache, rows_id
        self._keys = {name: [row_keys(example) for example in examples] for name, examples in sets.items()}
        self._totals: dict[bytes, float] = {}
        self.missing = {key for keys in self._keys.values() for own in keys for key in own}
        self._wanted, self._asked = len(self.missing), asked_for(self.missing)
        self._foreign: set[bytes] = set()
        """Rows that another computation has left."""
        self._look()
        self.cost = Cost(reused=len(self._totals))
        self._spent(began)

    def totals(self, name: str) -> list[tuple[float, ...]]:
        """Summed log-probabilities of every completion of every example of a set, in nats."""
        return [tuple(self._totals[key] for key in own) for own in self._keys[name]]

    def compute(
        self,
        roles: Any,
        role: str,
        *,
        pack_tokens: int,
        packing: Packing = "rows",
        tell: Tell = lambda message: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Compute what is missing, all ranks together, and keep it as it comes. Without a missing row no model is run.

        One run computes at a time; another that needs the same policy waits, and takes what is there by then.

        Args:
            roles: A `RoleModel`, bare or wrapped by DDP or DeepSpeed.
            role: Which of its roles is the reference.
            pack_tokens: Token budget of one forward pass.
            packing: How sequences are laid out.
            tell: Told how far it is.
            stop: Whether this process was asked to stop; then rows are left missing on every rank.

        Raises:
            TrainingError: A log-probability is not finite.
            ArtifactError: The disk is full.
        """
        began = time.monotonic()
        with ExitStack() as held:
            while self.missing and not self._locked(held):
                tell("waiting for another run that computes the same reference")
                if any(collectives.gather_objects(stop())):
                    return
                self._look()
            if self.missing:
                self._look()  # what the one before has left
            self.cost.reused = len(self._totals) - self.cost.computed
            if self.missing:
                self._fill(roles, role, pack_tokens, packing, tell, stop)
        self._spent(began)
        cost = self.cost
        logger.info("reference: %d rows computed, %d read, %.1f s", cost.computed, cost.reused, cost.seconds)

    def _spent(self, began: float) -> None:
        self.cost.seconds += time.monotonic() - began
        if self.rows_id and not self.missing and collectives.rank() == 0:
            self.cache.keep_complete(self.rows_id, self._wanted)

    # Reading ---------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Take from the cache what has come since the last look."""
        found: tuple[dict[bytes, float], set[bytes]] = {}, set()
        if collectives.rank() == 0:
            for key, row, asked in self.cache.rows(self.missing):
                found[0][key] = _total(row)
                if asked != self._asked:
                    found[1].add(key)
        totals, foreign = collectives.gather_objects(found)[0]
        self._take(totals)
        self._foreign |= foreign

    def _take(self, totals: Mapping[bytes, float]) -> None:
        self._totals |= totals
        self.missing -= totals.keys()

    def _locked(self, held: ExitStack) -> bool:
        """Whether rank 0 has got the lock of the cache; it is let go when `held` ends."""
        got = True
        if collectives.rank() == 0:
            try:
                held.enter_context(self.cache.lock(PATIENCE_SECONDS))
                self.cache.tidy()
            except Busy:
                got = False
        return collectives.gather_objects(got)[0]

    # Computing -------------------------------------------------------------------------------------------------------

    def _fill(
        self, roles: Any, role: str, pack_tokens: int, packing: Packing, tell: Tell, stop: Callable[[], bool]
    ) -> None:
        """Turn after turn, some packs per rank, until no rank has one left."""
        rank, world = collectives.rank(), collectives.world_size()
        todo = [
            block for block in self._blocks(pack_tokens) if any(key in self.missing for p in block for key in p.keys)
        ]
        own = self._packs(todo[rank::world], pack_tokens, packing)
        fresh, written = dict[bytes, Row](), time.monotonic()
        over = False
        while not over:
            turn = self._turn(roles, role, list(islice(own, PACKS_PER_TURN)))
            turn.stop = stop()
            turns = collectives.gather_objects(turn)
            if broken := sorted({row for each in turns for row in each.broken}):
                raise TrainingError(
                    f"log-probabilities of the reference are not finite for these rows of the data: {broken[:20]}",
                    fix="look at them with `align data preview`, or use a wider dtype",
                )
            for each in turns:
                fresh |= each.rows
                self._take({key: _total(row) for key, row in each.rows.items()})
                self.cost.computed += len(each.rows)
                self.cost.tokens += each.tokens
            over = all(each.over for each in turns) or any(each.stop for each in turns)
            late = time.monotonic() - written > SHARD_SECONDS
            if rank == 0 and fresh and (over or late or len(fresh) >= SHARD_ROWS):
                self.cache.add(fresh, self._asked)
                fresh, written = {}, time.monotonic()
            tell(f"reference log-probs: {self._wanted - len(self.missing)} of {self._wanted} rows")

    def _turn(self, roles: Any, role: str, packs: Sequence[tuple[Pack, list[_Part]]]) -> _Turn:
        """Run some packs; a rank that has fewer runs empty ones, because ZeRO-3 gathers parameters in every forward."""
        turn = _Turn(over=len(packs) < PACKS_PER_TURN)
        for pack, parts in packs:
            rows = [(part.example.row, *own) for part in parts for own in zip(part.keys, part.sizes, strict=True)]
            for (row, key, size), values in zip(rows, completion_token_logps(roles, role, pack), strict=True):
                if not np.isfinite(values).all():
                    turn.broken.append(row)
                if key in self.missing:
                    turn.rows[key] = values
                    turn.tokens += size
        if collectives.world_size() > 1:
            empty = empty_pack(0).to(next(roles.parameters()).device)
            with torch.no_grad():
                for _ in range(PACKS_PER_TURN - len(packs)):
                    roles(role, token_logps, empty)
        return turn

    def _packs(
        self, blocks: Sequence[list[_Part]], pack_tokens: int, packing: Packing
    ) -> Iterator[tuple[Pack, list[_Part]]]:
        """The packs of these blocks that hold a missing row, each with its parts."""
        for block in blocks:
            for pack in pack_examples([part.example for part in block], pack_tokens, packing=packing):
                parts = [block[i] for i in pack.examples]
                if any(key in self.missing for part in parts for key in part.keys):
                    yield pack, parts

    def _blocks(self, pack_tokens: int) -> Iterator[list[_Part]]:
        """Every row of this computation once, in blocks of like length.

        They depend on the rows alone: not on their order, not on the number of ranks, not on what an earlier run of the
        same computation has left. So a run that was killed, and one on other ranks, packs what is left as it would have
        been packed, and no bit is another.
        """
        block: list[_Part] = []
        tokens = 0
        for part in self._parts():
            block.append(part)
            tokens += sum(part.sizes)
            if tokens >= BLOCK_PACKS * pack_tokens:
                yield block
                block, tokens = [], 0
        if block:
            yield block

    def _parts(self) -> Iterator[_Part]:
        """Examples, longest first, each with those of its completions that none before it and no other run has."""
        together = {
            keys: example
            for name, examples in self.sets.items()
            for keys, example in zip(self._keys[name], examples, strict=True)
        }
        seen = set(self._foreign)
        for keys, example in sorted(together.items(), key=lambda item: (-max(_Part(item[1], item[0]).sizes), item[0])):
            own = {key: c for key, c in zip(keys, example.completions, strict=True) if key not in seen}
            seen |= own.keys()
            if own:
                yield _Part(replace(example, completions=tuple(own.values())), tuple(own))


def _total(row: Row) -> float:
    return float(row.sum(dtype=np.float64))


def starting_kl(
    roles: Any,
    examples: Sequence[Example],
    references: Sequence[Sequence[float]],
    *,
    pack_tokens: int,
    packing: Packing = "rows",
    same: bool,
    dtype: torch.dtype,
) -> float:
    """Compare policy and reference before the first step.

    Args:
        roles: The wrapped model, at step 0.
        examples: A few examples.
        references: Their log-probabilities under the reference.
        pack_tokens: Token budget of one forward pass.
        packing: How sequences are laid out.
        same: Whether policy and reference are the same stage, and so must agree.
        dtype: Compute dtype; decides the tolerance.

    Returns:
        Mean of log policy - log reference per completion, in nats: zero when the two are the same, and on text that the
        reference did not write only a hint of the KL when they differ.

    Raises:
        TrainingError: If they are the same stage and disagree, for then the reference is not what the recipe says.
    """
    policy = completion_logps(roles, "policy", examples, pack_tokens, packing)
    differences, worst = [], 0.0
    for example, own, other in zip(examples, policy, references, strict=True):
        for completion, p, r in zip(example.completions, own, other, strict=True):
            differences.append(p - r)
            worst = max(worst, abs(p - r) / max(1, sum(completion.mask)))
    if same and worst > TOLERANCE[dtype]:
        raise TrainingError(
            f"policy and reference are the same stage but differ by {worst:.3g} nats per token before the first step",
            fix="report this: the reference is not where the policy starts (dropout, wrong adapter, wrong base)",
        )
    return sum(differences) / len(differences)
