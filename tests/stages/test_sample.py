"""Candidates of real, tiny policies: their draws belong to seed, policy and prompt, and none is made twice."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.artifacts.chunks import Chunks, count_chunks
from align.artifacts.store import Artifact
from align.errors import DataError, RecipeError
from align.spec.data import FileData, GeneratedData
from align.stages import sample
from align.training.guards import Preempted
from tests.distributed.ranks import run_ranks
from tests.stages.shelf import Shelf, counted, make_shelf, rows

N = 10
HELDOUT = GeneratedData(generator="film-reviews", part="heldout", rows=N, format="prompts")
PAIRS = GeneratedData(generator="film-reviews", part="preferences", rows=N, format="pairs")
NEW = 12


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def draw(shelf: Shelf) -> Callable[..., Artifact]:
    return lambda *policies, data=HELDOUT, **settings: shelf.run(asked(shelf, *policies, data=data, **settings))


def asked(shelf: Shelf, *policies: str, data: Any = HELDOUT, generation: Any = None, **settings: Any) -> Any:
    generation = {"max_new_tokens": NEW, "batch_size": 8} | (generation or {})
    return shelf.job(
        "sample",
        {"asked": data},
        *policies,
        policies=list(policies),
        prompts="asked",
        generation=generation,
        **settings,
    )


def said(artifact: Artifact) -> dict[str, list[str]]:
    """Prompt -> answers."""
    return {row["prompt"][-1]["content"]: row["responses"] for row in rows(artifact)}


def test_every_policy_answers_every_prompt(shelf: Shelf, draw: Callable[..., Artifact]) -> None:
    artifact = draw("sft", "base", completions=3)
    found = rows(artifact)
    assert len(found) == N
    for row in found:
        assert row["sources"] == ["sft"] * 3 + ["base"] * 3
        assert {len(row[name]) for name in ("responses", "tokens", "logps", "ended")} == {6}
        assert row["fields"] == {"prompt": row["prompt"][-1]["content"]}
        assert all(float(logp) < 0 for logp in row["logps"])
        for text, tokens, ended in zip(row["responses"], row["tokens"], row["ended"], strict=True):
            assert ended or tokens == NEW
            assert "<|im_end|>" not in text
    manifest = artifact.manifest
    assert (manifest.kind, manifest.seed, sorted(manifest.inputs)) == ("sample", 0, ["base", "sft"])
    assert manifest.data["asked"]["examples"] == N
    metrics = manifest.metrics
    assert (metrics["prompts"], metrics["completions"], metrics["sft/completions"]) == (N, 6 * N, 3 * N)
    flags = [ended for row in found for ended in row["ended"]]
    assert metrics["ended"] == pytest.approx(sum(flags) / len(flags))
    assert metrics["length"] == pytest.approx((metrics["sft/length"] + metrics["base/length"]) / 2)
    assert metrics["distinct"] > 0.9
    assert shelf.told[-1][:2] == (2 * N, 2 * N)


def test_what_cannot_change_a_draw(draw: Callable[..., Artifact], tmp_path: Path) -> None:
    """The batch size, the order and the number of prompts, and other policies."""
    whole = said(draw("sft"))
    assert said(draw("sft", generation={"batch_size": 3})) == whole
    some = [{"prompt": prompt} for prompt in list(whole)[6:2:-1]]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    fewer = said(draw("sft", data=FileData(path=str(tmp_path / "some.jsonl"), format="prompts")))
    assert fewer == {row["prompt"]: whole[row["prompt"]] for row in some}
    beside = said(draw("far", "sft"))
    assert {prompt: answers[4:] for prompt, answers in beside.items()} == whole
    assert said(draw("sft", completions=2)) == {prompt: answers[:2] for prompt, answers in whole.items()}
    assert said(draw("sft", generation={"seed": 1})) != whole


def test_the_answers_of_the_data_are_candidates_too(draw: Callable[..., Artifact]) -> None:
    artifact = draw("sft", data=PAIRS, completions=2, include_responses=True)
    for row in rows(artifact):
        assert row["sources"] == ["data.chosen", "data.rejected", "sft", "sft"]
        assert row["responses"][:2] == [row["fields"]["chosen"], row["fields"]["rejected"]]
        assert row["target"] == row["fields"]["chosen"]
        assert row["logps"][:2] == [None, None]
        assert row["ended"][:2] == [True, True]
        assert all(tokens > 5 for tokens in row["tokens"][:2])
    assert artifact.manifest.metrics["completions"] == 2 * N, "what was drawn alone"
    alone = draw("sft", data=PAIRS, completions=2)
    assert [row["responses"] for row in rows(alone)] == [row["responses"][2:] for row in rows(artifact)]


@pytest.mark.parametrize(
    ("settings", "groups", "penalty"),
    [({"decoding": "beam"}, 1, 0.0), ({"decoding": "diverse_beam", "diversity_penalty": 0.7}, 3, 0.7)],
)
def test_beams(draw: Callable[..., Artifact], settings: dict[str, Any], groups: int, penalty: float) -> None:
    with counted(sample, "beam") as calls:
        artifact = draw("sft", completions=3, **settings)
    assert {(kwargs["beams"], kwargs["groups"], kwargs["penalty"]) for _, kwargs in calls} == {(3, groups, penalty)}
    assert all(len(row["responses"]) == 3 for row in rows(artifact))
    assert said(draw("sft", completions=3, **settings)) == said(artifact)


def test_greedy_is_one_answer(draw: Callable[..., Artifact]) -> None:
    first = said(draw("sft", completions=1, generation={"temperature": 0}))
    assert said(draw("sft", completions=1, decoding="beam")) == first


@pytest.fixture
def small_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts at a time, where two completions of each are drawn."""
    monkeypatch.setattr(sample, "ROUND_BATCHES", 1)


@pytest.mark.usefixtures("small_rounds")
def test_what_is_there_is_not_drawn_again(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rows(shelf.run(asked(shelf, "sft", "base", completions=2)))
    job = asked(shelf, "sft", "base", completions=2)
    broken = []

    def fails_later(*args: Any, **kwargs: Any) -> Any:
        broken.append(args)
        if len(broken) == 2:
            raise KeyboardInterrupt
        return before(*args, **kwargs)

    before = sample._Drawer._sampled
    with monkeypatch.context() as patch:
        patch.setattr(sample._Drawer, "_sampled", fails_later)
        with pytest.raises(KeyboardInterrupt):
            shelf.run(job)
    assert shelf.store.resumes_at(job.fingerprint) == count_chunks(Path(job.work)) == 4
    with counted(sample._Drawer, "_sampled") as calls:
        artifact = shelf.run(job)
    assert sum(len(args[1]) for args, _ in calls) == 2 * N - 4
    assert shelf.report.resumed_from_step == 4
    assert rows(artifact) == whole
    assert count_chunks(Path(job.work)) == 0
    assert shelf.store.resumes_at(job.fingerprint) is None


@pytest.mark.usefixtures("small_rounds")
def test_a_signal_stops_between_two_rounds(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    job = asked(shelf, "sft", completions=2)
    before, handler = Chunks.add, signal.getsignal(signal.SIGTERM)

    def stops(self: Chunks, values: Any) -> None:
        before(self, values)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Chunks, "add", stops)
        with pytest.raises(Preempted):
            shelf.run(job)
    assert count_chunks(Path(job.work)) == 4
    assert signal.getsignal(signal.SIGTERM) == handler
    assert len(rows(shelf.run(job))) == N


@pytest.mark.usefixtures("small_rounds")
def test_two_ranks_share_the_prompts(shelf: Shelf) -> None:
    job = asked(shelf, "sft", "base", completions=2)
    run_ranks(_on_a_rank, job, world=2)
    alone = shelf.run(asked(shelf, "sft", "base", completions=2))
    assert rows(shelf.store.get(job.fingerprint)) == rows(alone)


def _on_a_rank(rank: int, world: int, job: Any) -> None:
    from align.artifacts.store import Store
    from align.spec.sample import SampleStage

    with counted(sample._Drawer, "_sampled") as calls:
        sample.run(job, SampleStage.model_validate(job.settings), Store(Path(job.home)), lambda *told: None)
    # Each policy's ten prompts are three parts, of which the first rank does two: 4 + 2 and 4.
    assert sum(len(args[1]) for args, _ in calls) == (12 if rank == 0 else 8)


def test_prompts_that_leave_no_room(draw: Callable[..., Artifact], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="200 new tokens leave no room for a prompt in the 192 positions of `sft`"):
        draw("sft", generation={"max_new_tokens": 200})
    with pytest.raises(DataError, match="nothing is left of 10 rows: 10 prompt longer than max_tokens"):
        draw("sft", generation={"max_new_tokens": 190})
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "word " * 300}))
    artifact = draw("sft", data=FileData(path=str(tmp_path / "rows.jsonl"), format="prompts"))
    assert artifact.manifest.data["asked"]["dropped"] == {"prompt longer than max_tokens": 1}
    assert len(rows(artifact)) == 1
