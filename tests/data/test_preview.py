"""What `align data` shows, as plain text: nothing may be told by colour alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from align.data.check import first_examples, load_examples
from align.data.preview import preview_masks, preview_records, report_tables
from align.errors import DataError
from align.spec.data import FileData
from align.types import Batch
from tests.data.tokenizers import tokenizer_of

PAIR = {"prompt": [{"role": "user", "content": "why [bold]?"}], "chosen": "so", "rejected": "no", "weight": 2}


def shown(what: RenderableType) -> str:
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def lines(path: Path, *rows: Any, format: str) -> FileData:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileData(path=path.name, format=format)


def masks(source: FileData, batch: Batch, folder: Path, **options: Any) -> str:
    tokenizer = tokenizer_of("chatml")
    options = {"max_tokens": 512} | options
    examples = first_examples(source, 3, batch=batch, tokenizer=tokenizer, folder=folder, **options)
    return shown(preview_masks(source, examples, tokenizer))


def test_records_of_a_pair(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", {"prompt": "", "chosen": "a", "rejected": "b"}, PAIR, format="pairs")
    text = shown(preview_records(source, tmp_path, 3))
    assert "line 2, weight 2" in text
    for word in ("user", "why [bold]?", "chosen", "assistant", "so", "rejected", "no"):
        assert word in text
    assert "left out on the way: 1 empty prompt" in text


@pytest.mark.parametrize(
    ("format", "row", "words"),
    [
        ("text", {"text": "the sea"}, ["the sea"]),
        ("prompts", {"prompt": "why"}, ["user", "why"]),
        ("alpaca", {"instruction": "add", "input": "1 2", "output": "3"}, ["user", "add", "1 2", "assistant", "3"]),
    ],
)
def test_records_of_other_formats(tmp_path: Path, format: str, row: dict[str, str], words: list[str]) -> None:
    text = shown(preview_records(lines(tmp_path / "rows.jsonl", row, format=format), tmp_path, 3))
    positions = [text.index(word) for word in words]
    assert positions == sorted(positions)


RANKED = {"prompt": "why", "responses": ["so", "no", "hm"], "scores": [1, 2.5, -1], "target": "thus"}
LABELLED = [{"prompt": "why", "completion": "so", "label": True}, {"prompt": "how", "completion": "no", "label": 0}]


def in_order(text: str, *words: str) -> bool:
    return re.search(".*".join(map(re.escape, words)), text, re.DOTALL) is not None


def test_records_of_judged_answers(tmp_path: Path) -> None:
    source = lines(tmp_path / "ranked.jsonl", RANKED, format="ranked")
    text = shown(preview_records(source, tmp_path, 3))
    assert in_order(text, "why", "score 1", "so", "score 2.5", "no", "score -1", "hm", "target", "thus")
    pairs = shown(preview_records(source.model_copy(update={"convert": "adjacent_pairs"}), tmp_path, 3))
    assert in_order(pairs, "chosen", "no", "rejected", "so", "target", "thus", "chosen", "so", "rejected", "hm")
    margin = lines(tmp_path / "pairs.jsonl", PAIR | {"margin": 0.5}, format="pairs")
    assert "line 1, weight 2, margin 0.5" in shown(preview_records(margin, tmp_path, 3))
    single = shown(preview_records(lines(tmp_path / "one.jsonl", *LABELLED, format="unpaired"), tmp_path, 3))
    assert in_order(single, "why", "desirable", "so", "how", "undesirable", "no")


def test_no_records_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row has `text`"):
        preview_records(lines(tmp_path / "rows.jsonl", {"txt": "x"}, format="text"), tmp_path, 3)


def test_masks_bracket_what_is_trained(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    source = lines(tmp_path / "rows.jsonl", {"messages": turns}, format="messages")
    text = masks(source, Batch.TOKENS, tmp_path)
    assert "⟦b<|im_end|>⟧" in text
    assert "⟦d<|im_end|>⟧" in text
    assert text.count("⟦") == 3, "the legend and two turns"
    assert "line 1: prompt 9 tokens, trained 4" in text
    assert "⟦im_start" not in masks(source, Batch.TOKENS, tmp_path, loss_on="completion")
    assert "⟦user" in masks(source, Batch.TOKENS, tmp_path, loss_on="all")


def test_masks_of_a_pair_and_what_is_cut(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", PAIR | {"chosen": "so it is a very wide sea"}, format="pairs")
    text = masks(source, Batch.PAIRED, tmp_path, max_tokens=28)
    assert "chosen ⟦so" in text
    assert "⟧ (truncated)" in text
    assert "rejected ⟦no<|im_end|>⟧" in text


def test_masks_of_judged_answers(tmp_path: Path) -> None:
    source = lines(tmp_path / "ranked.jsonl", RANKED, format="ranked")
    text = masks(source, Batch.RANKED, tmp_path, target=True)
    assert in_order(text, "score 1 ⟦so", "score 2.5 ⟦no", "score -1 ⟦hm", "target ⟦thus")
    assert "target" not in masks(source, Batch.RANKED, tmp_path)
    pairs = source.model_copy(update={"convert": "best_worst"})
    assert in_order(masks(pairs, Batch.RANKED, tmp_path, target=True), "chosen ⟦no", "rejected ⟦hm", "target ⟦thus")
    single = masks(lines(tmp_path / "one.jsonl", *LABELLED, format="unpaired"), Batch.UNPAIRED, tmp_path)
    assert in_order(single, "desirable ⟦so", "of another prompt, not trained ⟦no", "undesirable ⟦no")


def test_reports_of_judged_answers(tmp_path: Path) -> None:
    def told(source: FileData, batch: Batch) -> str:
        tokenizer = tokenizer_of("chatml")
        _, report = load_examples(source, batch=batch, tokenizer=tokenizer, max_tokens=99, folder=tmp_path)
        return " ".join(shown(report_tables("d", report)).replace("│", " ").split())

    source = lines(tmp_path / "ranked.jsonl", RANKED, RANKED | {"scores": [1, 1, None]}, format="ranked")
    ranked = told(source, Batch.RANKED)
    assert "candidates 3 " in ranked
    assert "dropped: all candidates tied -1" in ranked
    pairs = told(source.model_copy(update={"convert": "all_pairs"}), Batch.PAIRED)
    assert "rows read 2 made of them by `convert` besides +2 dropped: all candidates tied -1 examples 3" in pairs
    assert "candidates 6" not in pairs
    single = lines(tmp_path / "one.jsonl", *LABELLED, LABELLED[0] | {"label": 0}, format="unpaired")
    assert "desirable 1 judgements that another one turns round 2" in told(single, Batch.UNPAIRED)


def test_reports_add_up(tmp_path: Path) -> None:
    rows = [{"prompt": "why", "chosen": f"so {n}", "rejected": "no"} for n in range(1200)]
    source = lines(tmp_path / "rows.jsonl", *rows, rows[0], "broken", format="pairs")
    _, report = load_examples(
        source, batch=Batch.PAIRED, tokenizer=tokenizer_of("chatml"), max_tokens=512, folder=tmp_path
    )
    told = shown(report_tables("preferences", report, {"heldout": 7}))
    found = {
        line.strip("│ ").split("│")[0].strip(): line.strip("│ ").split("│")[-1].strip() for line in told.splitlines()
    }
    assert found["rows read"] == "1,202"
    assert found["quarantined: not an object but text"] == "-1"
    assert found["dropped: duplicate"] == "-1"
    assert found["examples"] == "1,200"
    assert found["truncated (0.0%)"] == "0"
    assert found["prompts that `heldout` has as well"] == "7"
    assert found["chosen"] == str(report.tokens["chosen"]["max"])
    assert "data preferences" in told
