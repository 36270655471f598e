"""Scores of candidates: by a reward model, scorers and functions; what is cut off, empty or said twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align.artifacts.chunks import count_chunks
from align.artifacts.store import Artifact, Store
from align.data import load_examples
from align.data.chat import ChatEncoder
from align.data.records import Conversation
from align.errors import DataError, RecipeError, TrainingError
from align.logps import last_rewards, pack_examples
from align.models.rewards import load_reward
from align.recipe.sources import plugins
from align.spec.data import FileData
from align.spec.score import ScoreStage
from align.stages import score
from align.types import Batch
from tests.distributed.ranks import run_ranks
from tests.stages.shelf import Shelf, counted, make_shelf, rows

PROMPT = [{"role": "user", "content": "2 + 2?"}]
SCORERS = '''
class Length:
    """Counts letters."""

    def score(self, prompt, completion):
        return float(len(completion))

class Exact:
    label = "exact match"
    reads = ("answer",)

    def score(self, prompt, completion, *, answer):
        return float(completion == answer)

class Broken:
    def score(self, prompt, completion):
        return float("nan")
'''


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return make_shelf(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def house_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "score_scorers.py").write_text(SCORERS)
    info = tmp_path / "score_scorers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: score-scorers\nVersion: 1.0\n")
    entries = (
        "[align.scorers]\nlength = score_scorers:Length\nexact = score_scorers:Exact\nbroken = score_scorers:Broken\n"
    )
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(tmp_path)
    plugins.cache_clear()
    yield
    plugins.cache_clear()


@pytest.fixture
def entry(tmp_path: Path) -> Callable[..., FileData]:
    def make(*given: dict[str, Any], format: Any = "samples") -> FileData:
        path = tmp_path / "candidates.jsonl"
        path.write_text("".join(json.dumps({"prompt": PROMPT} | row) + "\n" for row in given))
        return FileData(path=str(path), format=format)

    return make


def run(shelf: Shelf, source: FileData, *, code: dict[str, str] | None = None, **settings: Any) -> Artifact:
    return shelf.run(job(shelf, source, code=code, **settings))


def job(shelf: Shelf, source: FileData, *, code: dict[str, str] | None = None, **settings: Any) -> Any:
    inputs = ("rm",) if settings.get("reward") else ()
    made = shelf.job("score", {"drawn": source}, *inputs, samples="drawn", folder=Path(source.path).parent, **settings)
    return made.model_copy(update={"code": code or {}})


def test_a_list_is_made_of_samples_and_what_is_known_of_them_goes_along(
    shelf: Shelf, entry: Callable[..., FileData]
) -> None:
    drawn = {
        "row": 7, "responses": ["four", "4", "4", " "], "sources": ["a", "a", "b", "b"], "tokens": [2, 2, 2, 1],
        "logps": [-1.0, -2.0, None, -3.0], "ended": [True, True, True, True], "target": "4", "fields": {"answer": "4"},
    }  # fmt: skip
    artifact = run(shelf, entry(drawn), scorers=["length"])
    (row,) = rows(artifact)
    assert row["scores"] == [4.0, 1.0, 1.0, None]
    assert row["parts"] == {"length": [4.0, 1.0, 1.0, None]}
    assert {name: row[name] for name in ("row", "responses", "sources", "tokens", "logps", "fields")} == {
        name: drawn[name] for name in ("row", "responses", "sources", "tokens", "logps", "fields")
    }
    assert row["target"] == [{"role": "assistant", "content": "4"}]
    assert "note" not in row
    metrics = artifact.manifest.metrics
    assert (metrics["prompts"], metrics["scored"], metrics["mean"], metrics["best"], metrics["spread"]) == (
        1,
        3,
        2,
        4,
        3,
    )
    assert (metrics["a/mean"], metrics["b/mean"]) == (2.5, 1.0)
    noted = artifact.manifest.data["drawn"]["noted"]
    assert noted == {"candidate left off: empty completion": 1, "candidate left off: said by an earlier one": 1}


def test_ranked_methods_read_it(shelf: Shelf, entry: Callable[..., FileData], tmp_path: Path) -> None:
    source = entry(
        {"responses": ["four", "4", "4"]},
        {"prompt": "why", "responses": ["a", "b"]},
        {"prompt": "how", "responses": ["a"]},
    )
    made = job(shelf, source, scorers=["length"])
    artifact = shelf.run(made)
    assert [row.get("note") for row in rows(artifact)] == [None, "all candidates tied", "fewer than two candidates"]
    assert artifact.manifest.metrics["tied"] == pytest.approx(1 / 3)
    examples, report = load_examples(
        shelf.made(made), batch=Batch.RANKED, tokenizer=shelf.tokenizer, max_tokens=99, folder=tmp_path
    )
    assert [example.scores for example in examples] == [(4.0, 1.0)]
    assert report.dropped == {"all candidates tied": 1, "fewer than two candidates": 1}
    assert report.noted == {"candidate left off: said by an earlier one": 1}


def test_columns_reach_a_verifier_and_parts_are_weighed(shelf: Shelf, entry: Callable[..., FileData]) -> None:
    source = entry({"responses": ["four", "4"], "fields": {"answer": "4"}})
    artifact = run(shelf, source, scorers=["exact", "length"], weights={"exact": 10.0, "length": -0.5})
    (row,) = rows(artifact)
    assert row["scores"] == [-2.0, 9.5]
    assert row["parts"] == {"exact match": [0.0, 1.0], "length": [4.0, 1.0]}
    assert artifact.manifest.metrics["exact match/mean"] == 0.5
    with pytest.raises(DataError, match="scorer `exact match` reads the column `answer`, which is not there in row 1"):
        run(shelf, entry({"responses": ["4"]}), scorers=["exact"])


def test_what_is_said_twice_is_scored_once(shelf: Shelf, entry: Callable[..., FileData]) -> None:
    from align.scoring import Blend

    with counted(Blend, "score") as calls:
        run(
            shelf, entry({"responses": ["a", "b", "a", "a"]}, {"prompt": "why", "responses": ["a"]}), scorers=["length"]
        )
    assert [args[2] for args, _ in calls] == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("settings", "scores"),
    [
        ({}, [3.0, None]),
        ({"missing_eos": "keep"}, [3.0, 5.0]),
        ({"missing_eos": "replace", "missing_eos_score": -7.0}, [3.0, -7.0]),
    ],
)
def test_what_was_cut_off(
    settings: dict[str, Any], scores: list[float], shelf: Shelf, entry: Callable[..., FileData]
) -> None:
    artifact = run(
        shelf, entry({"responses": ["abc", "abcde"], "ended": [True, False]}), scorers=["length"], **settings
    )
    (row,) = rows(artifact)
    assert row["scores"] == scores
    left_off = {"candidate left off: cut off before its end": 1, "fewer than two candidates": 1}
    assert artifact.manifest.data["drawn"]["noted"] == (left_off if None in scores else {})


def test_scores_of_a_list_are_made_anew(shelf: Shelf, entry: Callable[..., FileData]) -> None:
    source = entry(
        {"responses": ["aa", "b"], "scores": [1, 1]}, {"prompt": "how", "output": ["c", "dd"]}, format="ranked"
    )
    assert [row["scores"] for row in rows(run(shelf, source, scorers=["length"]))] == [[2.0, 1.0], [1.0, 2.0]]


def test_a_reward_model_scores_texts_that_have_ended(shelf: Shelf, entry: Callable[..., FileData]) -> None:
    said = ["four", "It is 4.", "4 <|im_end|>", "x" * 400, "stop <|im_start|> now"]
    multi = [*PROMPT, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]
    source = entry({"responses": said}, {"prompt": multi, "responses": ["Yes."]})
    artifact = run(shelf, source, reward="rm", scorers=["length"], weights={"length": 0.0})
    first, second = rows(artifact)
    model, _ = load_reward(shelf.store, "r" * 64)
    encoder = ChatEncoder(shelf.tokenizer, 192)

    def reward(messages: list[Any], text: str) -> float:
        example = encoder.encode(Conversation(0, [*messages, {"role": "assistant", "content": text}]))
        (pack,) = pack_examples([example], 999)
        with torch.no_grad():
            return model("reward", last_rewards, pack).item()

    expected = [reward(PROMPT, text) for text in said[:3]]
    assert first["parts"]["reward"] == pytest.approx([*expected, None, None], abs=1e-5)
    assert first["scores"] == pytest.approx([*expected, None, None], abs=1e-5)
    assert second["scores"] == pytest.approx([reward(multi, "Yes.")], abs=1e-5)
    noted = artifact.manifest.data["drawn"]["noted"]
    assert noted["candidate left off: longer than the reward model reads"] == 1
    assert noted["candidate left off: control token in the text"] == 1
    assert artifact.manifest.inputs == {"rm": "r" * 64}


CODE = """
def agrees(prompt, completion, answer):
    return completion == answer

def fails(prompt, completion):
    return [][0]
"""


def test_functions_of_the_user(shelf: Shelf, entry: Callable[..., FileData], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE.replace("return completion == answer", "return float(completion == answer)"))
    digest = hashlib.sha256((tmp_path / "mine.py").read_bytes()).hexdigest()
    source = entry({"responses": ["four", "4"], "fields": {"answer": "4"}})
    spec = "mine.py:agrees"
    (row,) = rows(run(shelf, source, functions=[spec], weights={"agrees": 2.0}, code={spec: digest}))
    assert (row["scores"], row["parts"]) == ([0.0, 2.0], {"agrees": [0.0, 1.0]})
    with pytest.raises(RecipeError, match=r"mine.py:agrees may not run"):
        run(shelf, source, functions=[spec])
    with pytest.raises(RecipeError, match="has changed since the run was planned"):
        run(shelf, source, functions=[spec], code={spec: "0" * 64})
    with pytest.raises(DataError, match="`fails` raised IndexError"):
        run(shelf, source, functions=["mine.py:fails"], code={"mine.py:fails": digest})


def test_a_score_that_is_none(shelf: Shelf, entry: Callable[..., FileData]) -> None:
    with pytest.raises(TrainingError, match="scorer `broken` returned nan for the prompt in row 1"):
        run(shelf, entry({"responses": ["a", "b"]}), scorers=["broken"])


MANY = [{"prompt": f"{i} + {i}?", "responses": [f"{2 * i}", "none", "a" * i]} for i in range(40)]


def test_what_is_scored_is_not_scored_again(
    shelf: Shelf, entry: Callable[..., FileData], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"reward": "rm", "scorers": ["length"]}
    whole = rows(run(shelf, entry(*MANY), **settings))
    started = job(shelf, entry(*MANY), **settings)
    calls: list[int] = []

    def fails_later(self: Any, part: Any) -> Any:
        calls.append(len(part))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return before(self, part)

    before = score._Judge.__call__
    with monkeypatch.context() as patch:
        patch.setattr(score._Judge, "__call__", fails_later)
        with pytest.raises(KeyboardInterrupt):
            shelf.run(started)
    assert calls == [16, 16, 8]
    assert shelf.store.resumes_at(started.fingerprint) == count_chunks(Path(started.work)) == 32
    with counted(score._Judge, "_judged") as judged:
        artifact = shelf.run(started)
    assert len(judged) == 8
    assert rows(artifact) == whole
    assert shelf.report.resumed_from_step == 32


def test_two_ranks_share_the_candidates(shelf: Shelf, entry: Callable[..., FileData]) -> None:
    settings = {"reward": "rm", "scorers": ["length"]}
    whole = rows(run(shelf, entry(*MANY), **settings))
    shared = job(shelf, entry(*MANY), **settings)
    assert run_ranks(_on_a_rank, shared, world=2) == [24, 16]
    assert rows(shelf.store.get(shared.fingerprint)) == whole


def _on_a_rank(rank: int, world: int, shared: Any) -> int:
    with counted(score._Judge, "_judged") as judged:
        score.run(shared, ScoreStage.model_validate(shared.settings), Store(Path(shared.home)), lambda *told: None)
    return len(judged)
