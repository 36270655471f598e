"""What is selected of scored candidates, and how many of the others were left out for which reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.artifacts.store import Artifact, Store
from align.data import load_examples
from align.data.reading import Reading
from align.data.records import Conversation, Pair
from align.errors import DataError
from align.spec.data import FileData
from align.stages import select
from align.types import Batch
from tests.data.conversations import conversation
from tests.data.tokenizers import tokenizer_of
from tests.stages.shelf import Shelf, rows

FOUR = conversation("2 + 2?")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(Store(tmp_path / "home"), tokenizer_of("chatml"))


@pytest.fixture
def pick(shelf: Shelf, tmp_path: Path) -> Callable[..., Artifact]:
    """Select of lists, given as response -> score each."""

    def run(
        *lists: dict[str, float | None], include: list[Any] | None = None, more: Any = None, **settings: Any
    ) -> Artifact:
        path = tmp_path / "scored.jsonl"
        given = [
            {"prompt": conversation(f"{i}?"), "responses": list(own), "scores": list(own.values()), "row": 10 + i,
             "sources": [f"s{k}" for k in range(len(own))], "fields": {"answer": i}} | (more or {})
            for i, own in enumerate(lists)
        ]  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
        data: dict[str, Any] = {"scored": FileData(path=str(path), format="ranked")}
        if include is not None:
            (tmp_path / "human.jsonl").write_text("".join(json.dumps(row) + "\n" for row in include))
            data["human"] = FileData(path=str(tmp_path / "human.jsonl"), format="messages")
            settings["include"] = "human"
        shelf.last = shelf.job("select", data, candidates="scored", **settings)
        return shelf.run(shelf.last)

    return run


def chosen(artifact: Artifact) -> list[tuple[str, str]]:
    """Prompt and answer of every conversation."""
    return [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in rows(artifact)]


def pairs(artifact: Artifact) -> list[tuple[str, str]]:
    return [(row["chosen"], row["rejected"]) for row in rows(artifact)]


def told(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.folder / select.SELECTION).read_text())


LISTS: tuple[dict[str, float | None], ...] = ({"a": 0.2, "b": 0.9, "c": 0.5}, {"d": 0.1, "e": 0.1}, {"f": 0.4})


@pytest.mark.parametrize(
    ("settings", "kept", "left"),
    [
        ({"how": "best_of_n"}, ["b", "d", "f"], {"not among the best": 3}),
        ({"how": "best_of_n", "n": 2}, ["b", "c", "d", "e", "f"], {"not among the best": 1}),
        ({"how": "above", "threshold": 0.4}, ["b", "c", "f"], {"below the threshold": 3}),
        ({"how": "above", "threshold": 0.1, "max_per_prompt": 1}, ["b", "d", "f"], {"more than max_per_prompt": 3}),
        ({"how": "top_fraction", "fraction": 0.5}, ["b", "c", "f"], {"not among the best": 3}),
        ({"how": "top_fraction", "fraction": 0.5, "max_per_prompt": 1}, ["b", "f"],
         {"not among the best": 3, "more than max_per_prompt": 1}),
        ({"how": "rft", "threshold": 0.1}, ["b", "d", "f"], {"same calculation as another, or a false one": 3}),
    ],
)  # fmt: skip
def test_conversations(
    pick: Callable[..., Artifact], settings: dict[str, Any], kept: list[str], left: dict[str, int]
) -> None:
    artifact = pick(*LISTS, **settings)
    found = [answer for _, answer in chosen(artifact)]
    if settings["how"] == "rft":  # one without a calculation is kept of each prompt, whichever it is
        assert len(found) == len(kept)
    else:
        assert found == kept
    assert told(artifact)["left"] == left
    assert told(artifact)["kept"] == len(kept)
    metrics = artifact.manifest.metrics
    assert (metrics["prompts"], metrics["candidates"], metrics["candidates_kept"]) == (3, 6, len(kept))
    assert metrics["conversations"] == len(kept)


def test_rft_keeps_paths_that_differ(pick: Callable[..., Artifact]) -> None:
    right, again, other = "<<1+3=4>>4 apples #### 4", "so <<1+3=4>>4 #### 4", "<<2*2=4>>4 #### 4"
    artifact = pick({right: 1, again: 1, other: 1, "<<2+2=5>>5, no 4 #### 4": 1, "5": 0}, how="rft")
    assert len(rows(artifact)) == 2
    assert other in [answer for _, answer in chosen(artifact)]
    assert told(artifact)["left"] == {"same calculation as another, or a false one": 2, "below the threshold": 1}


@pytest.mark.parametrize(
    ("settings", "made", "prompts"),
    [
        ({"how": "best_worst"}, ["ba"], {"all candidates tied": 1, "fewer than two candidates": 1}),
        ({"how": "all_pairs"}, ["bc", "ba", "ca"], {"all candidates tied": 1, "fewer than two candidates": 1}),
        ({"how": "adjacent_pairs"}, ["bc", "ca"], {"all candidates tied": 1, "fewer than two candidates": 1}),
        ({"how": "tournament"}, ["ba", "bc"], {"all candidates tied": 1, "fewer than two candidates": 1}),
        ({"how": "all_pairs", "min_margin": 0.35}, ["bc", "ba"],
         {"all candidates tied": 1, "fewer than two candidates": 1}),
    ],
)  # fmt: skip
def test_pairs(
    pick: Callable[..., Artifact], settings: dict[str, Any], made: list[str], prompts: dict[str, int]
) -> None:
    artifact = pick(*LISTS, **settings)
    assert ["".join(pair) for pair in pairs(artifact)] == made
    assert told(artifact)["prompts"] == prompts
    metrics = artifact.manifest.metrics
    assert (metrics["prompts_kept"], metrics["pairs"]) == (1, len(made))
    report = artifact.manifest.data["scored"]
    assert (report["rows_read"], report["examples"], report["dropped"]) == (3, 1, prompts)


def test_pairs_that_are_too_near(pick: Callable[..., Artifact]) -> None:
    artifact = pick({"a": 0.2, "b": 0.9}, {"c": 0.2, "d": 0.3}, how="best_worst", min_margin=0.2)
    assert pairs(artifact) == [("b", "a")]
    assert told(artifact)["pairs"] == {"pair within min_margin": 1}
    assert told(artifact)["prompts"] == {"pair within min_margin": 1}


def test_some_pairs_are_drawn_by_seed_and_prompt(pick: Callable[..., Artifact]) -> None:
    lists = [{letter: float(k) for k, letter in enumerate("abcdefgh")}] * 3
    first = pick(*lists, how="random_pairs", n=4)
    assert len(rows(first)) == 12
    assert pairs(pick(*lists, how="random_pairs", n=4)) == pairs(first)
    assert pairs(pick(*lists, how="random_pairs", n=4, seed=1)) != pairs(first)
    assert pairs(first)[:4] != pairs(first)[4:8]
    assert first.manifest.seed == 0


def test_a_pair_says_where_it_comes_from(pick: Callable[..., Artifact], shelf: Shelf, tmp_path: Path) -> None:
    artifact = pick({"a": 0.25, "b": 1.0}, how="best_worst", more={"target": "t"})
    assert rows(artifact) == [
        {
            "row": 10, "prompt": conversation("0?"), "chosen": "b", "rejected": "a", "margin": 0.75,
            "target": [{"role": "assistant", "content": "t"}], "chosen_score": 1.0, "rejected_score": 0.25,
            "chosen_source": "s1", "rejected_source": "s0", "fields": {"answer": 0},
        }
    ]  # fmt: skip
    ((record, _),) = Reading(shelf.made(shelf.last), tmp_path).records()
    assert isinstance(record, Pair)
    assert record.margin == 0.75
    examples, _ = load_examples(
        shelf.made(shelf.last), batch=Batch.PAIRED, tokenizer=shelf.tokenizer, max_tokens=99, folder=tmp_path
    )
    assert len(examples) == 1


def test_the_human_answers_stay(pick: Callable[..., Artifact], shelf: Shelf, tmp_path: Path) -> None:
    human = [{"messages": conversation("0?", "h"), "weight": 2.0}, {"messages": conversation("x?", "y", "z?", "w")}]
    artifact = pick(*LISTS, how="above", threshold=0.9, include=human)
    assert [row["messages"] for row in rows(artifact)] == [
        conversation("0?", "h"), conversation("x?", "y", "z?", "w"), conversation("0?", "b"),
    ]  # fmt: skip
    assert [row["source"] for row in rows(artifact)] == ["data", "data", "s1"]
    records = [record for record, _ in Reading(shelf.made(shelf.last), tmp_path).records()]
    assert [record.weight for record in records if isinstance(record, Conversation)] == [2.0, 1.0, 1.0]
    metrics = artifact.manifest.metrics
    assert (metrics["included"], metrics["conversations"], metrics["candidates_kept"]) == (2, 3, 1)
    assert artifact.manifest.data["human"]["examples"] == 2


def test_what_cannot_be_selected(pick: Callable[..., Artifact]) -> None:
    artifact = pick({"a": None, " ": 1.0, "b": 0.5}, how="best_of_n", n=9, more={"responses": ["b", " ", "b"]})
    assert chosen(artifact) == [("0?", "b")]
    assert told(artifact)["left"] == {"no score": 1, "empty completion": 1}
    with pytest.raises(DataError) as caught:
        pick(*LISTS, how="above", threshold=2)
    assert "nothing is selected of 3 prompts: 6 below the threshold, 3 no candidate kept" in str(caught.value)
    assert "look at the scores" in str(caught.value)


def test_ties_and_lone_candidates_of_data_are_read(pick: Callable[..., Artifact]) -> None:
    """Methods on lists drop them; that both answers of a prompt are right is no reason to drop them here."""
    assert [answer for _, answer in chosen(pick({"a": 1, "b": 1}, {"c": 1}, how="above"))] == ["a", "b", "c"]
