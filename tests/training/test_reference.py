"""Reference log-probabilities: once per token sequence, whoever asks, however a run ends, on any number of ranks."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from align.data.chat import Example
from align.errors import TrainingError
from align.logps import completion_logps
from align.logps.cache import RowCache
from align.models import load_base
from align.models.roles import RoleModel
from align.spec.model import LoraSettings
from align.training import reference as module
from align.training.reference import References, starting_kl
from align.training.trainer import Preempted
from tests.artifacts.processes import fork, wait
from tests.distributed.ranks import run_ranks
from tests.training.worlds import Run, fit, random_examples, save_tiny_base

PACK_TOKENS = 100
PAIRS = random_examples(20, 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


class Counting:
    """A real model, and how often it ran."""

    def __init__(self, base: Path, noise: int = 1) -> None:
        self.roles = RoleModel(load_base(base))
        self.roles.add_adapter("reference", settings=LoraSettings(rank=4, alpha=8), trainable=False, seed=noise)
        generator = torch.Generator().manual_seed(noise)
        for name, tensor in self.roles.tensors("reference").items():
            if "lora_B" in name:
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        self.passes = 0
        self.before = lambda: None
        self.roles.causal_lm.model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.before()
        self.passes += 1


@pytest.fixture(scope="module")
def model(base) -> Counting:
    return Counting(base)


@pytest.fixture(autouse=True)
def _from_zero(model: Counting) -> None:
    model.passes, model.before = 0, lambda: None


def totals(
    model: Counting, folder: Path, train: Sequence[Example], validation: Sequence[Example] = (), **options
) -> tuple[References, list[tuple[float, ...]]]:
    references = References({"train": train, "validation": validation}, RowCache(folder), "asked")
    references.compute(model.roles, "reference", pack_tokens=PACK_TOKENS, **options)
    return references, references.totals("train") + references.totals("validation")


def contents(folder: Path) -> dict[bytes, bytes]:
    class Everything:
        def __contains__(self, key: object) -> bool:
            return True

    return {key: row.tobytes() for key, row, _ in RowCache(folder).rows(Everything())}


# --- what it computes --------------------------------------------------------------------------------------------


def test_totals_are_those_of_the_role(model: Counting, tmp_path: Path) -> None:
    _, found = totals(model, tmp_path / "rows", PAIRS[:15], PAIRS[15:])
    expected = completion_logps(model.roles, "reference", PAIRS, 10_000)
    flat = [value for row in found for value in row]
    assert flat == pytest.approx([value for row in expected for value in row], abs=2e-4)
    assert {len(row) for row in found} == {2}


def test_a_second_time_no_model_runs(model: Counting, tmp_path: Path) -> None:
    first, expected = totals(model, tmp_path / "rows", PAIRS)
    assert (first.cost.computed, first.cost.reused) == (40, 0)
    assert first.cost.tokens == sum(len(e.prompt_ids) + len(c.ids) for e in PAIRS for c in e.completions)
    passes = model.passes
    assert passes > 4
    second = References({"train": PAIRS}, RowCache(tmp_path / "rows"))
    assert second.missing == set()
    second.compute(None, "no role", pack_tokens=0)
    assert second.totals("train") == expected
    assert model.passes == passes
    assert (second.cost.computed, second.cost.reused) == (0, 40)
    assert "reference/tokens_per_second" not in second.cost.metrics()


def layouts(kind: str) -> list[Example]:
    """The completions of the pairs as other methods ask for them."""
    if kind == "reversed":
        return PAIRS[::-1]
    if kind == "unpaired":
        return [
            replace(e, row=100 + i, completions=(c,), scores=(1.0,)) for i, e in enumerate(PAIRS) for c in e.completions
        ]
    if kind == "ranked":
        return [replace(e, completions=e.completions[::-1], scores=(0.2, 0.7)) for e in PAIRS]
    return [replace(e, row=e.row + 7, weight=0.5, group=b"other") for e in PAIRS]


@pytest.mark.parametrize("kind", ["reversed", "unpaired", "ranked", "weighted"])
def test_other_methods_find_the_same_rows(kind: str, model: Counting, tmp_path: Path) -> None:
    _, expected = totals(model, tmp_path / "rows", PAIRS)
    passes = model.passes
    references, found = totals(model, tmp_path / "rows", layouts(kind))
    assert (references.cost.computed, model.passes) == (0, passes)
    assert sorted(v for row in found for v in row) == sorted(v for row in expected for v in row)


def test_order_split_and_repetition_change_no_bit(model: Counting, tmp_path: Path) -> None:
    totals(model, tmp_path / "one", PAIRS)
    totals(model, tmp_path / "two", PAIRS[::-1][:11] + PAIRS[:3], PAIRS[::-1][11:])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 40


def test_a_row_that_stands_in_two_examples_is_computed_once(model: Counting, tmp_path: Path) -> None:
    chosen, rejected = PAIRS[0].completions
    twice = [PAIRS[0], replace(PAIRS[0], completions=(rejected, PAIRS[1].completions[0], chosen))]
    references, found = totals(model, tmp_path / "rows", twice)
    assert references.cost.computed == 3
    assert (found[1][2], found[1][0]) == found[0]


def test_only_what_is_missing_is_computed(model: Counting, tmp_path: Path) -> None:
    """One more pair costs a pack, not the whole."""
    totals(model, tmp_path / "rows", PAIRS[1:])
    model.passes = 0
    references, _ = totals(model, tmp_path / "rows", PAIRS)
    assert (references.cost.computed, references.cost.reused, model.passes) == (2, 38, 1)


def test_what_another_method_left_is_not_computed_beside_what_is_missing(model: Counting, tmp_path: Path) -> None:
    """KTO asks for another prompt's completion beside every one that DPO had: only that one is run."""
    totals(model, tmp_path / "rows", PAIRS)
    chosen = [replace(e, completions=(e.completions[0], o.completions[1])) for e, o in pairwise(PAIRS)]
    tokens: list[int] = []
    hook = model.roles.causal_lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    references, _ = totals(model, tmp_path / "rows", chosen)
    hook.remove()
    assert (references.cost.computed, references.cost.reused) == (19, 19)
    assert references.cost.tokens <= sum(tokens) < 1.5 * references.cost.tokens


def test_numbers_that_are_not_finite_are_told_and_not_kept(base: Path, tmp_path: Path) -> None:
    broken = Counting(base)
    weight = broken.roles.causal_lm.lm_head.weight
    token = PAIRS[7].completions[1].ids[-1]
    with torch.no_grad():
        weight[token] = float("nan")
    with pytest.raises(TrainingError, match=r"not finite for these rows of the data: \[.*7.*\]"):
        totals(broken, tmp_path / "rows", [PAIRS[7]])
    assert contents(tmp_path / "rows") == {}


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_shard_is_computed_again(damage: str, model: Counting, tmp_path: Path, caplog) -> None:
    _, expected = totals(model, tmp_path / "rows", PAIRS)
    before = contents(tmp_path / "rows")
    (shard,) = (tmp_path / "rows").glob("rows-*")
    content = bytearray(shard.read_bytes())
    content[-2] ^= 64
    shard.write_bytes(content if damage == "bit" else content[:-9])
    references, found = totals(model, tmp_path / "rows", PAIRS)
    assert references.cost.computed == 40
    assert found == expected
    assert contents(tmp_path / "rows") == before
    assert f"{shard.name} is damaged" in caplog.text


# --- ends and neighbours -----------------------------------------------------------------------------------------


def test_what_a_killed_run_computed_is_kept(model: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle and run again: the rest is computed, and every bit is that of an undisturbed run."""
    _, expected = totals(model, tmp_path / "whole", PAIRS)
    whole, model.passes = model.passes, 0
    monkeypatch.setattr(module, "SHARD_SECONDS", 0.0)

    def die() -> None:
        if model.passes == whole - 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        model.before = die
        totals(model, tmp_path / "rows", PAIRS)

    assert wait(fork(run)) == -signal.SIGKILL
    kept = contents(tmp_path / "rows")
    assert 0 < len(kept) < 40
    references, found = totals(model, tmp_path / "rows", PAIRS)
    assert (references.cost.reused, references.cost.computed) == (len(kept), 40 - len(kept))
    assert 0 < model.passes <= 2 + module.PACKS_PER_TURN
    assert found == expected
    assert contents(tmp_path / "rows") == contents(tmp_path / "whole")


def test_shards_come_while_it_computes(model: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 10)
    totals(model, tmp_path / "rows", PAIRS)
    assert len(list((tmp_path / "rows").glob("rows-*"))) in (3, 4)


def test_two_runs_at_once_share_the_work(model: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    told: list[str] = []

    def run(name: str) -> None:
        model.before = lambda: time.sleep(0.1)
        (tmp_path / f"{name} is here").touch()
        while len(list(tmp_path.glob("* is here"))) < 2:
            time.sleep(0.01)
        references, found = totals(model, tmp_path / "rows", PAIRS, tell=told.append)
        waited = any("waiting for another run" in line for line in told)
        seen = {"computed": references.cost.computed, "reused": references.cost.reused, "waited": waited}
        (tmp_path / name).write_text(json.dumps([seen, found]))

    pids = [fork(lambda name=name: run(name)) for name in ("a", "b")]
    assert [wait(pid) for pid in pids] == [0, 0]
    (one, first), (two, second) = (json.loads((tmp_path / name).read_text()) for name in ("a", "b"))
    assert first == second
    assert sorted([one["computed"], two["computed"]]) == [0, 40]
    assert sorted([one["reused"], two["reused"]]) == [0, 40]
    assert one["waited"] != two["waited"]


def test_who_waits_takes_what_is_there_without_the_lock(model: Counting, tmp_path: Path, monkeypatch) -> None:
    """The other run goes on, with rows that this one does not want."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    _, expected = totals(model, tmp_path / "rows", PAIRS)
    model.passes = 0
    waiting = References({"train": PAIRS}, RowCache(tmp_path / "other" / "rows"))
    rows = {key: row for key, row, _ in RowCache(tmp_path / "rows").rows(waiting.missing)}
    writer = RowCache(tmp_path / "other" / "rows")
    with writer.lock(1.0):
        threading.Timer(0.3, lambda: writer.add(rows, bytes(16))).start()
        waiting.compute(model.roles, "reference", pack_tokens=PACK_TOKENS)
    assert waiting.totals("train") == expected
    assert (waiting.cost.reused, model.passes) == (40, 0)


def test_a_wish_to_stop_keeps_what_is_there(model: Counting, tmp_path: Path) -> None:
    references = References({"train": PAIRS}, RowCache(tmp_path / "rows"))
    wishes = iter([False, True])
    references.compute(model.roles, "reference", pack_tokens=PACK_TOKENS, stop=lambda: next(wishes))
    assert references.missing
    assert len(contents(tmp_path / "rows")) == 40 - len(references.missing) > 0


# --- in the trainer ----------------------------------------------------------------------------------------------


def lines(work: Path) -> list[dict]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def test_its_cost_is_told_by_itself(base: Path, tmp_path: Path) -> None:
    for name, computed, reused in (("one", 62, 0), ("two", 0, 62)):
        run = Run(base, tmp_path / name, "dpo", steps=1, validation=7, reference_rows=tmp_path / "rows")
        fit(0, 1, run)
        first = lines(run.work)[0]
        assert first["step"] == 0
        assert (first["reference/computed"], first["reference/reused"]) == (computed, reused)
        assert first["reference/seconds"] > 0
        assert ("reference/tokens_per_second" in first) == (computed > 0)
        assert first["start/log_ratio"] == pytest.approx(0, abs=1e-5)


def test_methods_of_one_reference_share_it(base: Path, tmp_path: Path) -> None:
    """IPO after DPO reads rows and trains as it would have alone."""
    fit(0, 1, Run(base, tmp_path / "dpo", "dpo", steps=1, reference_rows=tmp_path / "rows"))
    after = fit(0, 1, Run(base, tmp_path / "after", "ipo", steps=3, reference_rows=tmp_path / "rows"))
    alone = fit(0, 1, Run(base, tmp_path / "alone", "ipo", steps=3))
    assert lines(tmp_path / "after")[0]["reference/computed"] == 0
    assert lines(tmp_path / "alone")[0]["reference/computed"] == 48
    assert after["losses"] == alone["losses"]


def test_a_signal_while_the_reference_is_computed(base: Path, tmp_path: Path) -> None:
    run = Run(base, tmp_path, "dpo", steps=1)

    def ask(trainer, rank):
        trainer.stop_request.received = signal.SIGTERM

    with pytest.raises(Preempted):
        fit(0, 1, replace(run, parameter_hook=ask))
    kept = len(contents(tmp_path / "reference"))
    assert 0 < kept < 48
    fit(0, 1, run)
    assert lines(tmp_path)[0]["reference/reused"] == kept


def test_a_reference_that_is_another_policy_is_found_out(model: Counting, base: Path, tmp_path: Path) -> None:
    """Rows of a wrong policy do not get past the first look."""
    _, other = totals(model, tmp_path / "rows", PAIRS)
    roles = RoleModel(load_base(base))
    roles.add_base_role("policy")
    options = {"pack_tokens": PACK_TOKENS, "dtype": torch.float32}
    with pytest.raises(TrainingError, match="differ by"):
        starting_kl(roles, PAIRS[:4], other[:4], same=True, **options)
    assert abs(starting_kl(roles, PAIRS[:4], other[:4], same=False, **options)) > 0.01


# --- ranks -------------------------------------------------------------------------------------------------------


def rows_of(rank: int, world: int, run: Run) -> tuple[dict[bytes, bytes], dict]:
    fit(rank, world, run)
    return contents(run.work / "reference"), lines(run.work)[0]


@pytest.mark.parametrize("deepspeed", ["none", "zero3"])
def test_two_ranks_keep_the_rows_of_one(deepspeed: str, base: Path, tmp_path: Path) -> None:
    """Packs do not depend on the ranks, so no bit does. Thirty pairs in packs of two are more than a turn's."""
    pytest.importorskip("deepspeed")
    one, first = run_ranks(rows_of, Run(base, tmp_path / "one", "dpo", steps=1, validation=7), world=1)[0]
    run = Run(base, tmp_path / "two", "dpo", steps=1, validation=7, deepspeed=deepspeed)
    found = run_ranks(rows_of, run, deepspeed=deepspeed != "none")
    assert found[0] == found[1]
    two, again = found[0]
    assert one.keys() == two.keys()
    assert len(one) == 62
    assert one == two
    assert again["reference/computed"] == first["reference/computed"] == 62


def test_ranks_that_find_everything_run_nothing(base: Path, tmp_path: Path) -> None:
    first = Run(base, tmp_path / "one", "dpo", steps=2, reference_rows=tmp_path / "rows")
    expected = run_ranks(fit, first, world=1)[0]
    second = replace(first, work=tmp_path / "two")
    for result in run_ranks(fit, second):
        assert result["losses"] == pytest.approx(expected["losses"], abs=2e-5)
    assert lines(tmp_path / "two")[0]["reference/computed"] == 0


def killed(rank: int, world: int, run: Run) -> None:
    """Both ranks end in the middle of the reference; what rank 0 had written stays."""
    module.SHARD_SECONDS = 0.0
    trainer = run.trainer()
    trainer.report = End()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


class End:
    resumed_from_step = 0

    def __call__(self, step: int, total: int, message: str) -> None:
        if message.startswith("reference log-probs"):
            raise KeyboardInterrupt


def test_another_number_of_ranks_goes_on(base: Path, tmp_path: Path) -> None:
    run = Run(base, tmp_path / "cut", "dpo", steps=1, validation=7)
    run_ranks(killed, run)
    assert 0 < len(contents(run.work / "reference")) < 62
    (again,) = run_ranks(rows_of, run, world=1)
    whole = run_ranks(rows_of, replace(run, work=tmp_path / "whole"), world=1)[0]
    assert again[0] == whole[0]
    assert again[1]["reference/reused"] > 0
