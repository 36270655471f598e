"""Files of every kind, good and broken; generators; a data set as `datasets` reads it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from align.data.records import BadRow
from align.data.sources import number_word, read_rows
from align.errors import DataError, LaunchError, RecipeError
from align.spec.data import FileData, GeneratedData, HubData

ROWS = [{"text": "the sea"}, {"text": "é 바다\n😊"}, {"text": 'a, "b"\tc'}]


def file(path: Path, content: str | bytes, **settings: Any) -> FileData:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return FileData(path=path.name, format="text", **settings)


def rows(source: Any, folder: Path) -> list[Any]:
    return [(n, row if isinstance(row, dict) else row.reason) for n, row in read_rows(source, folder)]


def as_lines(values: list[Any], end: str = "\n") -> str:
    return "".join(json.dumps(value) + end for value in values)


@pytest.mark.parametrize(
    ("name", "content", "first"),
    [
        ("rows.json", json.dumps(ROWS), 0),
        ("rows.json", "\ufeff" + json.dumps(ROWS, ensure_ascii=False, indent=4).replace("\n", "\r\n"), 0),
        ("rows.json", json.dumps({"version": 1, "data": ROWS}), 0),
        ("rows.json", as_lines(ROWS), 0),
        ("rows.JSONL", as_lines(ROWS), 1),
        ("rows.ndjson", "\ufeff" + as_lines(ROWS, "\r\n"), 1),
        ("rows.jsonl", as_lines(ROWS).rstrip("\n"), 1),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_json_and_lines_of_it(tmp_path: Path, name: str, content: str, first: int, packed: bool) -> None:
    data = content.encode()
    source = file(tmp_path / (name + ".gz" * packed), gzip.compress(data) if packed else data)
    assert rows(source, tmp_path) == list(enumerate(ROWS, start=first))
    assert number_word(source) == ("row" if first == 0 else "line")


def test_blank_lines_count_as_lines_and_not_as_rows(tmp_path: Path) -> None:
    source = file(tmp_path / "rows.jsonl", '{"text": "a"}\n\n  \n{"text": "b"}\n{"text": "c"}\n', skip=1, limit=1)
    assert rows(source, tmp_path) == [(4, {"text": "b"})]


def test_broken_lines_are_rows_that_are_bad(tmp_path: Path) -> None:
    lines = [b'{"text": "a"}', b'{"text": ', b"[1]", b'{"text": "\xff"}', b"null", b"[" * 100_000, b'{"text": "z"}']
    found = list(read_rows(file(tmp_path / "rows.jsonl", b"\n".join(lines)), tmp_path))
    reasons = [row.reason if isinstance(row, BadRow) else row["text"] for _, row in found]
    assert reasons == [
        "a",
        "not JSON",
        "not an object but a list",
        "not UTF-8",
        "not an object but null",
        "not JSON",
        "z",
    ]
    assert [number for number, _ in found] == list(range(1, 8))
    assert found[3][1].raw == '{"text": "\\xff"}'


def test_csv_with_a_byte_order_mark_quotes_and_windows_line_ends(tmp_path: Path) -> None:
    content = '\ufefftext,weight\r\n"a, ""b""\r\nc",1\r\nplain,2\r\n\r\nshort\r\nthe end,3,more\r\nlast,4\r\n'
    assert rows(file(tmp_path / "rows.csv", content), tmp_path) == [
        (2, {"text": 'a, "b"\r\nc', "weight": "1"}),
        (4, {"text": "plain", "weight": "2"}),
        (6, "1 cells under 2 columns"),
        (7, "3 cells under 2 columns"),
        (8, {"text": "last", "weight": "4"}),
    ]


def test_csv_with_very_long_cells(tmp_path: Path) -> None:
    source = file(tmp_path / "rows.csv.gz", gzip.compress(f"text\n{'x' * 300_000}\n".encode()))
    assert len(rows(source, tmp_path)[0][1]["text"]) == 300_000


def test_quotes_in_tsv_are_text(tmp_path: Path) -> None:
    content = 'genre\ttext\nnews\tthe "sea\nnews\t"wide"\n'
    found = rows(file(tmp_path / "rows.tsv", content), tmp_path)
    assert found == [(2, {"genre": "news", "text": 'the "sea'}), (3, {"genre": "news", "text": '"wide"'})]


def test_parquet(tmp_path: Path) -> None:
    from datasets import Dataset

    rows_ = [{"messages": [{"role": "user", "content": "é", "name": None}], "weight": 1.5}] * 3
    Dataset.from_list(rows_).to_parquet(tmp_path / "rows.parquet")
    source = FileData(path="rows.parquet", format="messages", skip=1)
    assert rows(source, tmp_path) == [(1, rows_[0]), (2, rows_[0])]


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(as_lines(ROWS))
    monkeypatch.setenv("SET", str(folder))
    assert rows(HubData(hub="${env:SET}", format="text", limit=2), tmp_path) == [(0, ROWS[0]), (1, ROWS[1])]
    with pytest.raises(DataError, match=r"Unknown split \"test\""):
        rows(HubData(hub=str(folder), split="test", format="text"), tmp_path)
    with pytest.raises(LaunchError, match="nobody/nothing"):
        rows(HubData(hub="nobody/nothing", format="text"), tmp_path)


def test_rows_of_a_generator(tmp_path: Path) -> None:
    source = GeneratedData(generator="film-reviews", part="corpus", rows=5, format="prompt_completion", skip=3, limit=1)
    ((number, row),) = rows(source, tmp_path)
    assert number == 3
    assert set(row) == {"prompt", "completion"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": "film-review"}, "did you mean `film-reviews`"),
        ({"part": "corpsu"}, "did you mean `corpus`"),
        ({"format": "text"}, "has the format prompt_completion, not text"),
    ],
)
def test_generators_are_asked_for_what_they_make(tmp_path: Path, change: dict[str, str], message: str) -> None:
    settings = {"generator": "film-reviews", "part": "corpus", "rows": 5, "format": "prompt_completion"}
    with pytest.raises(RecipeError, match=message):
        rows(GeneratedData(**(settings | change)), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"{", r"rows.json:1: not JSON"),
        ("rows.json", b'[{"text": "a"},\n {"text": "b",}]', r"rows.json:2: not JSON"),
        ("rows.json", b'[{"text": "a"},\n {"text": "\xff"}]', r"rows.json:2: not UTF-8"),
        ("rows.json", b'{"a": [], "b": []}', r"an object, not a list of rows"),
        ("rows.json", b'"text"', r"text, not a list of rows"),
        ("rows.json.gz", b"not packed", r"rows.json.gz cannot be read"),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], r"rows.jsonl.gz cannot be read"),
        ("rows.csv", b"a,b,a\n1,2,3\n", r"rows.csv:1: two columns are called 'a'"),
        ("rows.parquet", b"PAR1", r"rows.parquet: not Parquet"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        rows(file(tmp_path / name, content), tmp_path)
    assert caught.value.fix


def test_files_that_are_not_there_or_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="there is no file"):
        rows(FileData(path="none.json", format="text"), tmp_path)
    with pytest.raises(RecipeError, match="no kind of file"):
        rows(file(tmp_path / "rows.xlsx", ""), tmp_path)
    with pytest.raises(RecipeError, match="no kind of file"):
        rows(file(tmp_path / "rows.parquet.gz", ""), tmp_path)
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    with pytest.raises(LaunchError, match="NO_SUCH_FOLDER"):
        rows(FileData(path="${env:NO_SUCH_FOLDER}/rows.json", format="text"), tmp_path)


def test_paths_may_hold_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file(tmp_path / "rows.jsonl", as_lines(ROWS))
    monkeypatch.setenv("DATA_FILE", str(tmp_path / "rows.jsonl"))
    source = FileData(path="${env:DATA_FILE}", format="text")
    assert [row for _, row in rows(source, Path("/nowhere"))] == ROWS
    assert number_word(source) == "line"
