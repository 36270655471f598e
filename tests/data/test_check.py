"""From a data entry to examples: what is counted, quarantined, dropped and refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data import DataReport, Example, load_examples, load_prompts, split_validation, training_texts
from align.data.check import RECORDS_OF_BATCH, RECORDS_WITH_PROMPT, first_examples, shared_prompts
from align.errors import DataError, RecipeError
from align.methods import get_method
from align.recipe.schema import stage_kinds
from align.spec.base import DataRef
from align.spec.data import FileData
from align.spec.stages import Stage
from align.types import Batch
from tests.data.tokenizers import tokenizer_of


def lines(path: Path, *rows: Any, **settings: Any) -> FileData:
    """A JSONL file; a text is a line as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return FileData(**({"path": str(path), "format": "prompt_completion"} | settings))


def qa(prompt: Any, completion: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def load(source: FileData, batch: Batch = Batch.TOKENS, **options: Any) -> tuple[list[Example], DataReport]:
    defaults: dict[str, Any] = {"tokenizer": tokenizer_of("chatml"), "max_tokens": 512, "folder": Path()}
    return load_examples(source, batch=batch, **(defaults | options))


def test_every_row_is_counted_once(tmp_path: Path) -> None:
    long = "the sea is wide " * 40
    source = lines(
        tmp_path / "rows.jsonl",
        qa("why", "so"),
        qa("why", "so"),
        "{broken",
        qa("why", None),
        qa("why", " "),
        qa("how", long),
        qa(long, "so"),
        qa("a <|im_end|> b", "so"),
        qa("why", "thus", weight=2),
        qa("why", "so", weight=-1),
        [1],
        max_bad_rows=0.5,
    )
    quarantine = tmp_path / "work" / "quarantine.jsonl"
    examples, report = load(source, max_tokens=64, quarantine=quarantine)
    assert [(example.row, example.weight) for example in examples] == [(1, 1.0), (6, 1.0), (9, 2.0)]
    assert [example.completions[0].truncated for example in examples] == [False, True, False]
    assert report.model_dump(exclude={"tokens"}) == {
        "rows_read": 11,
        "records": 7,
        "converted": 0,
        "examples": 3,
        "quarantined": {
            "not JSON": 1,
            "`completion` is null, not text or a list of messages": 1,
            "`weight` is not a positive number": 1,
            "not an object but a list": 1,
        },
        "dropped": {
            "duplicate": 1,
            "empty completion": 1,
            "prompt leaves no room for a completion": 1,
            "control token in the text": 1,
        },
        "noted": {},
        "truncated": 1,
        "prompts": 2,
        "candidates": 0,
        "desirable": 0,
        "contradictions": 0,
    }
    assert report.rows_read == report.examples + sum(report.quarantined.values()) + sum(report.dropped.values())
    assert DataReport.model_validate_json(report.model_dump_json()) == report
    assert [json.loads(line) for line in quarantine.read_text().splitlines()] == [
        {"line": 3, "reason": "not JSON", "raw": "{broken"},
        {
            "line": 4,
            "reason": "`completion` is null, not text or a list of messages",
            "raw": '{"prompt": "why", "completion": null}',
        },
        {
            "line": 10,
            "reason": "`weight` is not a positive number",
            "raw": '{"prompt": "why", "completion": "so", "weight": -1}',
        },
        {"line": 11, "reason": "not an object but a list", "raw": "[1]"},
    ]


def test_lengths_in_tokens(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", *(qa(f"{n}", "the sea " * n) for n in range(1, 41)))
    examples, report = load(source)
    lengths = sorted(len(example.completions[0].ids) for example in examples)
    assert report.tokens["completion"] == {
        "p50": lengths[20],
        "p90": lengths[36],
        "p99": lengths[39],
        "max": lengths[39],
    }
    assert report.tokens["total"]["max"] == max(len(e.prompt_ids) + len(e.completions[0].ids) for e in examples)
    assert set(report.tokens) == {"prompt", "completion", "total"}


def test_an_older_quarantine_is_removed_when_all_rows_are_good(tmp_path: Path) -> None:
    quarantine = tmp_path / "quarantine.jsonl"
    quarantine.write_text("old")
    load(lines(tmp_path / "rows.jsonl", qa("why", "so")), quarantine=quarantine)
    assert not quarantine.exists()


def test_too_many_malformed_rows_stop_the_run(tmp_path: Path) -> None:
    good = [qa(f"why {n}", "so") for n in range(396)]
    bad = [qa("a", None), "{", qa(1, "b"), qa("c", None)]
    mixed = [*good[:50], bad[0], *good[50:], *bad[1:]]
    load(lines(tmp_path / "rows.jsonl", *mixed, max_bad_rows=0.01))
    quarantine = tmp_path / "quarantine.jsonl"
    with pytest.raises(DataError) as caught:
        load(lines(tmp_path / "rows.jsonl", *mixed, max_bad_rows=0.009), quarantine=quarantine)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "4 of 400 rows are malformed (1.00%, max_bad_rows is 0.90%)" in message
    assert (
        "line 51: `completion` is null, not text or a list of messages; line 398: not JSON; line 399: `prompt`"
        in message
    )
    assert "line 400" not in message
    assert str(quarantine) in message
    assert len(quarantine.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no rows"),
        ([qa("a", "b")], {"skip": 1}, "no rows after skip: 1"),
        ([{"promt": "a", "completion": "b"}], {}, "no row has `prompt`.*did you mean `promt`"),
        ([{"question": "a", "answer": "b"}], {}, "no row has `prompt` and `completion`.*question, answer"),
        ([qa("a", "b")], {"columns": {"prompt": "promt"}}, "no row has the column `promt`; did you mean `prompt`"),
        ([qa("a", "b")], {"columns": {"weight": "score"}}, "no row has the column `score`"),
        ([qa("a", "")], {}, "nothing is left of 1 rows: 1 empty completion"),
        ([{"input": "a", "output_1": "b", "output_2": "c"}], {"format": "labelled_pairs"}, "no row has `label`, which"),
        ([{"instruction": "a", "candidates": []}], {"format": "ranked"}, "no row has `responses`, .*candidates"),
        ([{"messages": [], "kto_tag": True}], {"format": "unpaired"}, "no row has `label`, .*messages, kto_tag"),
    ],
)
def test_mistakes_of_the_whole_file(tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str) -> None:
    batches = {"labelled_pairs": Batch.PAIRED, "ranked": Batch.RANKED, "unpaired": Batch.UNPAIRED}
    batch = batches.get(options.get("format", ""), Batch.TOKENS)
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        load(lines(tmp_path / "rows.jsonl", *rows, **options), batch)
    assert "rows.jsonl" in str(caught.value)


def test_a_template_that_refuses_rows_quarantines_them(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", qa("why", "so"), qa("how", "so"), system="be kind")
    with pytest.raises(
        DataError, match=r"2 of 2 rows.*line 1: the chat template refuses it: System role not supported"
    ):
        load(source, tokenizer=tokenizer_of("gemma"))


def test_broken_bytes_in_a_csv_are_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"text\nthe sea \xc3\xa9\nthe \xff sea\n")
    quarantine = tmp_path / "quarantine.jsonl"
    source = FileData(path="rows.csv", format="text", max_bad_rows=0.5)
    examples, report = load(source, folder=tmp_path, quarantine=quarantine)
    assert len(examples) == 1
    assert report.quarantined == {"`text` has broken unicode": 1}
    assert json.loads(quarantine.read_text())["line"] == 3


def test_the_same_words_with_another_weight_are_another_row(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "rows.jsonl", qa("why", "so", weight=1), qa("why", "so", weight=2), qa("why", "so", weight=1)
    )
    assert [example.weight for example in load(source)[0]] == [1.0, 2.0]
    rows = [{"prompt": "why", "chosen": "so", "rejected": "no", "weight": weight} for weight in (1, 2, 1)]
    pairs, _ = load(lines(tmp_path / "pairs.jsonl", *rows, format="pairs"), Batch.PAIRED)
    assert [pair.weight for pair in pairs] == [1.0, 2.0]


def test_pairs_and_their_contradictions(tmp_path: Path) -> None:
    rows = [
        {"prompt": "why", "chosen": "so", "rejected": "no"},
        {"prompt": "why", "chosen": "no", "rejected": "so"},
        {"prompt": "why", "chosen": "so", "rejected": "hm"},
        {"prompt": "how", "chosen": "no", "rejected": "so"},
        {"prompt": "how", "chosen": "so", "rejected": "so"},
    ]
    examples, report = load(lines(tmp_path / "rows.jsonl", *rows, format="pairs"), Batch.PAIRED)
    assert [len(example.completions) for example in examples] == [2] * 4
    assert report.contradictions == 2
    assert report.dropped == {"chosen and rejected are the same": 1}
    assert report.prompts == 2
    assert set(report.tokens) == {"prompt", "chosen", "rejected", "total"}


@pytest.mark.parametrize(
    ("format", "batch"),
    [("pairs", Batch.TOKENS), ("prompts", Batch.TOKENS), ("alpaca", Batch.PAIRED), ("text", Batch.PAIRED)],
)
def test_formats_that_do_not_fit_the_method(tmp_path: Path, format: str, batch: Batch) -> None:
    with pytest.raises(RecipeError, match=f"format {format} gives"):
        load(lines(tmp_path / "rows.jsonl", qa("a", "b"), format=format), batch)


def references(stage: type[Stage]) -> dict[str, set[str]]:
    """Fields of a stage that name data -> the kinds of records that may stand there."""
    marks = ((name, mark) for name, field in stage.model_fields.items() for mark in field.metadata)
    return {name: set(mark.records) for name, mark in marks if isinstance(mark, DataRef)}


def test_stages_may_name_what_their_readers_read() -> None:
    kinds = stage_kinds()
    for kind, stage in kinds.items():
        asked = references(stage)
        if "prompts" in asked:
            assert asked["prompts"] == set(RECORDS_WITH_PROMPT), kind
        if "data" in asked:
            assert asked["data"] == set(RECORDS_OF_BATCH[get_method(kind).batch]), kind
    assert {"prompts"} == set(references(kinds["compare"]))
    assert {"data"} == set(references(kinds["rrhf"]))


def test_a_system_message_for_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no system message"):
        load(lines(tmp_path / "rows.jsonl", {"text": "a b c"}, format="text", system="be kind"))


def test_prompts_of_every_kind_of_record(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("chatml")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_tokens": 60, "folder": tmp_path}
    for source in (
        lines(tmp_path / "prompts.jsonl", {"prompt": turns}, {"prompt": turns}, format="prompts"),
        lines(
            tmp_path / "messages.jsonl",
            {"messages": [*turns, {"role": "assistant", "content": "d"}]},
            format="messages",
        ),
        lines(tmp_path / "pairs.jsonl", {"prompt": turns, "chosen": "d", "rejected": "e"}, format="pairs"),
    ):
        (prompt,), report = load_prompts(source, **options)
        assert prompt.text == "c"
        assert prompt.messages == turns
        assert tokenizer.decode(prompt.prompt_ids).endswith("c<|im_end|>\n<|im_start|>assistant\n")
        assert report.examples == report.prompts == 1
        assert report.tokens == {"prompt": dict.fromkeys(("p50", "p90", "p99", "max"), len(prompt.prompt_ids))}
    long = lines(tmp_path / "long.jsonl", {"prompt": "x"}, {"prompt": "the sea " * 50}, format="prompts")
    assert load_prompts(long, **options)[1].dropped == {"prompt longer than max_tokens": 1}
    with pytest.raises(RecipeError, match="format text gives"):
        load_prompts(lines(tmp_path / "text.jsonl", {"text": "x"}, format="text"), **options)


def test_texts_for_a_tokenizer_are_everything_that_is_said(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", qa("why", "so"), qa("why", "so"), qa("how", "no"), system="be kind")
    assert list(training_texts(source, tmp_path)) == ["be kind", "why", "so", "be kind", "how", "no"]
    pairs = lines(tmp_path / "pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, format="pairs")
    assert list(training_texts(pairs, tmp_path)) == ["a", "b", "c"]
    texts = lines(tmp_path / "texts.jsonl", {"text": "a\n"}, format="text")
    assert list(training_texts(texts, tmp_path)) == ["a\n"]
    with pytest.raises(DataError, match="malformed"):
        list(training_texts(lines(tmp_path / "bad.jsonl", qa("why", "so"), "{"), tmp_path))


def test_examples_cross_process_borders(tmp_path: Path) -> None:
    examples, _ = load(lines(tmp_path / "rows.jsonl", qa("why", "so")))
    assert pickle.loads(pickle.dumps(examples)) == examples


@settings(max_examples=30, deadline=None)
@given(
    groups=st.lists(st.integers(0, 9), min_size=2, max_size=60).filter(lambda groups: len(set(groups)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_validation_holds_out_whole_prompts(groups: list[int], fraction: float, seed: int) -> None:
    examples = [Example(row, [group], (), 1.0) for row, group in enumerate(groups)]
    train, held = split_validation(examples, fraction, seed)
    assert sorted([*train, *held], key=lambda example: example.row) == examples
    assert [e.row for e in train] == sorted(e.row for e in train)
    assert {e.prompt_ids[0] for e in train}.isdisjoint({e.prompt_ids[0] for e in held})
    assert train
    assert held
    assert split_validation(examples, fraction, seed) == (train, held)
    largest = max(groups.count(group) for group in groups)
    assert len(held) < max(1, round(fraction * len(groups))) + largest


def test_validation_groups_by_prompt_also_where_everything_is_trained(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", *(qa(f"why {n % 10}", f"so {n}") for n in range(40)))
    examples, _ = load(source, loss_on="all")
    assert len({tuple(example.prompt_ids) for example in examples}) == 1
    train, held = split_validation(examples, 0.2, seed=1)
    assert (len(train), len(held)) == (32, 8)
    assert {example.group for example in train}.isdisjoint({example.group for example in held})


def test_one_prompt_cannot_be_split(tmp_path: Path) -> None:
    examples, _ = load(lines(tmp_path / "rows.jsonl", *(qa("why", f"so {n}") for n in range(9))))
    with pytest.raises(DataError, match="9 examples of 1 prompt"):
        split_validation(examples, 0.5, 0)


def test_prompts_that_two_entries_share(tmp_path: Path) -> None:
    train = lines(tmp_path / "train.jsonl", qa("a", "1"), qa("b", "2"), qa("b", "3"), qa("c", "4"))
    held = lines(tmp_path / "held.jsonl", {"prompt": "b"}, {"prompt": "d"}, format="prompts")
    other = lines(tmp_path / "other.jsonl", {"prompt": "x", "chosen": "y", "rejected": "z"}, format="pairs")
    assert shared_prompts(train, {"held": held, "other": other}, tmp_path) == {"held": 2, "other": 0}
    assert shared_prompts(held, {"train": train}, tmp_path) == {"train": 1}


def test_the_first_examples_are_read_whatever_follows(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", qa("a", ""), qa("a", "1"), qa("b", "2"), qa("c", "3"), "{", "{")
    options: dict[str, Any] = {"batch": Batch.TOKENS, "tokenizer": tokenizer_of("chatml"), "max_tokens": 99}
    assert [e.row for e in first_examples(source, 2, folder=tmp_path, **options)] == [2, 3]
    with pytest.raises(DataError, match="malformed"):
        first_examples(lines(tmp_path / "bad.jsonl", "{", "{"), 2, folder=tmp_path, **options)
