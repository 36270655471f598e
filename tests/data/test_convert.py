"""What one row is made into: pairs of a list, single answers, the best; and how that is told and counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from align.data import DataReport, Example, load_examples, load_prompts, training_texts
from align.data.convert import as_prompt, convert
from align.data.reading import Reading
from align.data.records import Conversation, Pair, Prompt, Ranked, Record, Unpaired
from align.errors import DataError, RecipeError
from align.recipe import Graph, build_graph, load_recipe
from align.recipe.rows import count_rows
from align.spec.data import RECORDS_OF_CONVERSION, Conversion, DataSource, FileData
from align.types import Batch
from tests.data.conversations import conversation
from tests.data.tokenizers import tokenizer_of

WHY = conversation("why")


def answer(text: str) -> list[Any]:
    return conversation("", text)[1:]


def ranked(*scores: float, **more: Any) -> Ranked:
    """Candidates a, b, c, ... with these scores."""
    return Ranked(4, WHY, [answer("abcdefgh"[k]) for k in range(len(scores))], list(scores), **more)


def letters(records: list[Record]) -> list[str]:
    """The pairs of a conversion, better letter first."""
    return [pair.chosen[0]["content"] + pair.rejected[0]["content"] for pair in records if isinstance(pair, Pair)]


@pytest.mark.parametrize(
    ("how", "scores", "pairs"),
    [
        ("all_pairs", (1, 3, 2), ["bc", "ba", "ca"]),
        ("all_pairs", (1, 2, 2), ["ba", "ca"]),
        ("best_worst", (1, 3, 2), ["ba"]),
        ("best_worst", (2, 2, 1, 1), ["ad"]),
        ("adjacent_pairs", (1, 3, 2), ["bc", "ca"]),
        ("adjacent_pairs", (4, 3, 3, 1), ["ab", "cd"]),
        ("tournament", (1, 3, 2), ["ba", "bc"]),
        ("tournament", (2, 2, 1, 1), ["ac"]),
        # The vector `slic_tournament`.
        ("tournament", (0.3, 0.9, 0.1, 0.5, 0.8, 0.2, 0.7, 0.4), ["ba", "dc", "ef", "gh", "bd", "eg", "be"]),
    ],
)
def test_pairs_of_a_list(how: Conversion, scores: tuple[float, ...], pairs: list[str]) -> None:
    assert letters(convert(ranked(*scores), how)) == pairs


scores_of_a_list = st.lists(st.integers(-3, 3), min_size=2, max_size=8).filter(lambda scores: len(set(scores)) > 1)


@given(scores=scores_of_a_list)
def test_pairs_are_in_the_order_of_the_scores(scores: list[int]) -> None:
    record = ranked(*scores)
    value = dict(zip("abcdefgh", scores, strict=False))
    pairs = {how: letters(convert(record, how)) for how in ("all_pairs", "adjacent_pairs", "tournament", "best_worst")}
    for found in pairs.values():
        assert found
        assert all(value[a] > value[b] for a, b in found)
    assert len(pairs["all_pairs"]) == sum(a != b for a, b in combinations(scores, 2))
    assert len(pairs["adjacent_pairs"]) == len(set(scores)) - 1
    assert set(pairs["adjacent_pairs"] + pairs["tournament"] + pairs["best_worst"]) <= set(pairs["all_pairs"])
    assert len(pairs["tournament"]) <= len(scores) - 1
    ((best, worst),) = pairs["best_worst"]
    assert (value[best], value[worst]) == (max(scores), min(scores))


def test_pairs_keep_row_weight_and_target() -> None:
    for pair in convert(ranked(1, 3, 2, weight=2.0), "all_pairs"):
        assert isinstance(pair, Pair)
        assert (pair.row, pair.weight, pair.margin) == (4, 2.0, 0.0)
        assert pair.target == answer("b"), "the best"
    for pair in convert(ranked(1, 3, 2, target=answer("t")), "all_pairs"):
        assert isinstance(pair, Pair)
        assert pair.target == answer("t")


def test_single_answers() -> None:
    singles = [Unpaired(4, WHY, answer("b"), True, 2.0), Unpaired(4, WHY, answer("a"), False, 2.0)]
    assert convert(Pair(4, WHY, answer("b"), answer("a"), 2.0, 0.5), "unpaired") == singles
    assert convert(ranked(1, 3, 2, weight=2.0), "unpaired") == singles


def test_the_best_answer_is_a_conversation() -> None:
    best = [Conversation(4, conversation("why", "b"), 2.0)]
    assert convert(ranked(1, 3, 3, weight=2.0), "best") == best
    assert convert(Pair(4, WHY, answer("b"), answer("a"), 2.0), "best") == best


@pytest.mark.parametrize(
    "record", [ranked(1, 2), Unpaired(4, WHY, answer("a"), True), Pair(4, WHY, answer("a"), answer("b"))]
)
def test_prompts_of_records_that_have_one(record: Record) -> None:
    assert as_prompt(record) == Prompt(4, WHY)
    assert convert(record, None) == [record]


def rows(path: Path, *given: Any, **settings: Any) -> FileData:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in given))
    return FileData(**({"path": str(path), "format": "ranked"} | settings))


def load(source: FileData, batch: Batch, **options: Any) -> tuple[list[Example], DataReport]:
    defaults: dict[str, Any] = {"tokenizer": tokenizer_of("chatml"), "max_tokens": 512, "folder": Path()}
    return load_examples(source, batch=batch, **(defaults | options))


LISTS = [
    {"prompt": "why", "responses": ["a", "b", "c"], "scores": [1, 3, 2]},
    {"prompt": "why", "responses": ["b", "c"], "scores": [2, 1]},
    "{broken",
    {"prompt": "how", "responses": ["a", "b", ""], "scores": [2, 1, 0]},
    {"prompt": "how", "responses": ["a", "b"], "scores": [1, 1]},
]

MADE = {
    # records besides one of each, examples, duplicates
    "all_pairs": (2, 4, 1),
    "adjacent_pairs": (1, 3, 1),
    "tournament": (1, 3, 1),
    "best_worst": (0, 3, 0),
    "unpaired": (3, 5, 1),
    "best": (0, 2, 1),
}


@pytest.mark.parametrize("how", get_args(Conversion))
def test_every_row_and_every_record_made_of_it_is_counted_once(tmp_path: Path, how: Conversion) -> None:
    converted, examples, duplicates = MADE[how]
    batch = {"pair": Batch.PAIRED, "unpaired": Batch.UNPAIRED, "conversation": Batch.TOKENS}
    source = rows(tmp_path / "rows.jsonl", *LISTS, convert=how, max_bad_rows=0.5)
    found, report = load(source, batch[RECORDS_OF_CONVERSION[how][1]])
    assert (report.rows_read, report.records, report.converted) == (5, 4, converted)
    assert (len(found), report.examples) == (examples, examples)
    assert report.quarantined == {"not JSON": 1}
    assert report.dropped == {"all candidates tied": 1} | ({"duplicate": duplicates} if duplicates else {})
    assert report.rows_read + report.converted == examples + 1 + sum(report.dropped.values())


def test_a_row_is_quarantined_once_however_many_records_were_made_of_it(tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", *LISTS[:1], convert="all_pairs", system="be kind")
    with pytest.raises(DataError, match=r"1 of 1 rows are malformed \(100.00%"):
        load(source, Batch.PAIRED, tokenizer=tokenizer_of("gemma"), quarantine=tmp_path / "quarantine.jsonl")
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1


def test_prompts_are_those_of_the_rows(tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", *LISTS, convert="all_pairs", max_bad_rows=0.5)
    options: dict[str, Any] = {"tokenizer": tokenizer_of("chatml"), "max_tokens": 99, "folder": tmp_path}
    prompts, report = load_prompts(source, **options)
    assert [prompt.text for prompt in prompts] == ["why", "how"]
    assert (report.converted, report.dropped) == (0, {"duplicate": 1, "all candidates tied": 1})


def test_texts_are_those_of_what_is_trained(tmp_path: Path) -> None:
    texts = {how: list(training_texts(rows(tmp_path / "rows.jsonl", LISTS[0], convert=how), tmp_path))
             for how in (None, "best", "unpaired")}  # fmt: skip
    assert texts == {
        None: ["why", "a", "b", "c"],
        "best": ["why", "b"],
        "unpaired": ["why", "b", "why", "a"],
    }


@pytest.mark.parametrize(
    ("format", "how", "message"),
    [
        ("pairs", "all_pairs", "`all_pairs` takes ranked records, format pairs holds pair records"),
        ("alpaca", "best", "`best` takes ranked or pair records"),
        ("unpaired", "unpaired", "`unpaired` takes pair or ranked records"),
    ],
)
def test_records_that_cannot_be_converted(tmp_path: Path, format: str, how: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Reading(FileData(path="rows.jsonl", format=format, convert=how), tmp_path)


def test_rows_are_counted_as_far_as_they_tell(tmp_path: Path) -> None:
    def count(how: Conversion | None, **settings: Any) -> int | None:
        return count_rows(rows(tmp_path / "rows.jsonl", *LISTS, convert=how, **settings), tmp_path)

    assert [count(how) for how in (None, "best", "best_worst", "unpaired")] == [5, 5, 5, 10]
    assert count("unpaired", limit=2) == 4
    assert count("all_pairs") is count("adjacent_pairs") is count("tournament") is None


RECIPE = """\
name: demo
model: {base: owner/model}
data:
  rows: {path: rows.jsonl, format: %s}
stages:
  one: {kind: %s, data: rows}
"""

Check = Callable[[str, str], Graph]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Builds the graph of a recipe of one entry and one stage."""

    def build(settings: str, kind: str) -> Graph:
        rows(tmp_path / "rows.jsonl", *LISTS)
        (tmp_path / "recipe.yaml").write_text(RECIPE % (settings, kind))
        return build_graph(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "home")

    return build


@pytest.mark.parametrize(
    ("settings", "kind", "told", "fix"),
    [
        (
            "ranked",
            "sft",
            "6: stages.one.data: `rows` has the format ranked, which holds ranked records; sft reads conversation or",
            "formats that serve: text, alpaca, messages, sharegpt, prompt_completion; or write `convert: best`",
        ),
        (
            "ranked, convert: best_worst",
            "sft",
            "6: stages.one.data: `rows` has the format ranked and convert: best_worst, which holds pair records",
            "or write `convert: best` in `ranked` data",
        ),
        (
            "ranked, convert: unpaired",
            "simpo",
            "6: stages.one.data: `rows` has the format ranked and convert: unpaired, which holds unpaired records",
            "or write `convert: all_pairs | best_worst | adjacent_pairs | tournament` in `ranked` data",
        ),
        (
            "alpaca, convert: all_pairs",
            "sft",
            "4: data.rows.convert: `all_pairs` takes ranked records; format alpaca holds conversation records",
            "remove it, or choose a format that it takes: ranked, mt_bench",
        ),
        (
            "ranked, convert: al_pairs",
            "simpo",
            '4: data.rows.convert: "al_pairs" is not one of the choices; did you mean `all_pairs`?',
            "write `all_pairs`",
        ),
    ],
)
def test_an_entry_holds_what_it_is_converted_to(check: Check, settings: str, kind: str, told: str, fix: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(settings, kind)
    assert caught.value.exit_code == 2
    first, second = str(caught.value).splitlines()
    assert f"recipe.yaml:{told}" in first
    assert fix in second


def test_conversions_serve_the_stages_they_are_made_for(check: Check) -> None:
    for settings, kind in (
        ("ranked, convert: best", "sft"),
        ("pairs, convert: best", "sft"),
        ("mt_bench, convert: all_pairs", "simpo"),
        ("labelled_pairs", "simpo"),
        ("ranked, convert: best_worst", "rrhf"),
        ("ranked", "rrhf"),
        ("pairs", "rrhf"),
    ):
        assert check(settings, kind).nodes["one"].data["rows"].format == settings.split(",")[0]


def test_a_conversion_counts_in_the_fingerprint_and_its_absence_does_not(check: Check) -> None:
    hows = ("all_pairs", "best_worst", "adjacent_pairs", "tournament")
    made = {how: check(f"ranked, convert: {how}", "simpo").nodes["one"] for how in hows}
    assert len({node.fingerprint for node in made.values()}) == 4
    assert [node.data["rows"].convert for node in made.values()] == list(hows)
    without = check("pairs", "simpo").nodes["one"]
    assert without.fingerprint == check("pairs, convert: null", "simpo").nodes["one"].fingerprint
    # Written to the worker's job and read again, an entry is what it was.
    entries = TypeAdapter(dict[str, DataSource])
    for node in (*made.values(), without):
        assert entries.validate_json(entries.dump_json(node.data)) == node.data


def test_a_conversion_of_prompts_has_no_effect(check: Check, tmp_path: Path) -> None:
    recipe = RECIPE % ("pairs, convert: best", "sft")
    recipe += "  two: {kind: compare, candidates: [one], baseline: one, prompts: rows}\n"
    (tmp_path / "both.yaml").write_text(recipe)
    rows(tmp_path / "rows.jsonl", *LISTS)
    assert build_graph(load_recipe(tmp_path / "both.yaml"), tmp_path / "home").nodes["two"].data
    other = recipe.replace("data:\n", "data:\n  more: {path: rows.jsonl, format: alpaca}\n")
    (tmp_path / "both.yaml").write_text(other.replace("data: rows", "data: more"))
    with pytest.raises(RecipeError, match=r"5: data\.rows\.convert: `convert` has no effect: only prompts"):
        build_graph(load_recipe(tmp_path / "both.yaml"), tmp_path / "home")
