"""Rows of a data entry, one at a time: files, data sets of the Hub, generators."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from align.data.records import BadRow
from align.errors import DataError, LaunchError, RecipeError
from align.recipe.env import resolve_env
from align.recipe.sources import plugin, plugins
from align.recipe.suggest import did_you_mean
from align.spec.data import FILE_KINDS, FileData, GeneratedData, HubData

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row | BadRow]]
Source = FileData | HubData | GeneratedData


def read_rows(source: Source, folder: Path) -> Rows:
    """Rows of a data entry after `skip`, at most `limit` of them.

    Args:
        source: The entry.
        folder: Where relative paths start.

    Yields:
        The number of a row and the row, or why it is none. Numbers are those of `number_word`.

    Raises:
        DataError: The source as a whole cannot be read.
        RecipeError: The entry names no such generator or part, or an unknown kind of file.
        LaunchError: The Hub cannot be reached, or a variable is not set.
    """
    rows = _all_rows(source, folder)
    return islice(rows, source.skip, None if source.limit is None else source.skip + source.limit)


def number_word(source: Source, folder: Path) -> str:
    """What counts rows: ``line`` (from 1) in files of lines, else ``row`` (from 0, as `skip` counts)."""
    return "line" if isinstance(source, FileData) and _kind(_path(source, folder)) in ("jsonl", "csv", "tsv") else "row"


def source_name(source: Source, folder: Path) -> str:
    """What a message calls the entry; variables stay as they are written."""
    if isinstance(source, FileData):
        return source.path
    if isinstance(source, HubData):
        return f"{source.hub} ({source.split})"
    return f"{source.generator}/{source.part}"


def _all_rows(source: Source, folder: Path) -> Rows:
    if isinstance(source, GeneratedData):
        return _generated(source)
    if isinstance(source, HubData):
        return _hub(source)
    path = _path(source, folder)
    reader = {"json": _json, "jsonl": _jsonl, "parquet": _parquet, "csv": _csv, "tsv": _csv}[_kind(path)]
    return reader(path)


def _path(source: FileData, folder: Path) -> Path:
    return folder / str(resolve_env(source.path))


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    kind = FILE_KINDS.get(Path(name).suffix)
    if kind is None:
        raise RecipeError(
            f"{path}: no reader for this kind of file", fix=f"name it {', '.join(FILE_KINDS)} (or any of these .gz)"
        )
    return kind


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _as_row(value: Any) -> Row | BadRow:
    return value if isinstance(value, dict) else BadRow(f"not an object but {type_word(value)}", json.dumps(value))


def type_word(value: Any) -> str:
    """The type of a value in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _jsonl(path: Path) -> Rows:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> Row | BadRow:
    try:
        return _as_row(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError:
        return BadRow("not UTF-8", line.decode("utf-8", "backslashreplace"))
    except (json.JSONDecodeError, RecursionError):
        return BadRow("not JSON", line.decode("utf-8"))


def _json(path: Path) -> Rows:
    with _open(path) as file:
        content = file.read()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start})", fix="convert it to UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    if isinstance(value, dict):
        lists = [key for key, each in value.items() if isinstance(each, list)]
        if len(lists) != 1:
            raise DataError(f"{path} is an object with {len(lists)} lists", fix="make it a list of rows")
        value = value[lists[0]]
    if not isinstance(value, list):
        raise DataError(f"{path} is {type_word(value)}, not a list of rows", fix="make it a list of rows")
    for number, each in enumerate(value):
        yield number, _as_row(each)


def _csv(path: Path) -> Rows:
    tabs = _kind(path) == "tsv"
    csv.field_size_limit(2**31 - 1)
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file)
        header = next(reader, [])
        before = reader.line_num
        for cells in reader:
            number, before = before + 1, reader.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                yield number, BadRow(f"{len(cells)} cells under {len(header)} columns", str(cells))
            else:
                yield number, dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> Rows:
    import datasets

    table = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    yield from enumerate(table)


def _hub(source: HubData) -> Rows:
    import datasets

    name = str(resolve_env(source.hub))
    try:
        table = datasets.load_dataset(name, source.subset, split=source.split, revision=source.revision)
    except Exception as error:
        raise LaunchError(f"{name} cannot be read: {error}", fix="check the name and the connection") from error
    yield from enumerate(table)


def _generated(source: GeneratedData) -> Rows:
    known = plugins("align.generators")
    if source.generator not in known:
        raise RecipeError(f"no generator `{source.generator}`" + did_you_mean(source.generator, known))
    made = plugin("align.generators", source.generator)().generate(
        source.part, source.rows, source.seed, source.options
    )
    for number, row in enumerate(made):
        yield number, _as_row(row)
