"""How many records a data entry has at most, where that is cheap to know: no row is parsed into one."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import BinaryIO

from align.recipe.env import resolve_env
from align.spec.data import Conversion, DataSource, FileData, GeneratedData

MAX_BYTES = 128 * 2**20
"""Largest file that is read for this: about a second."""


MADE_OF_A_ROW: dict[Conversion, int] = {"best_worst": 1, "unpaired": 2, "best": 1}
"""Records that a conversion makes of each row; how many pairs a list gives, only the list can tell."""


def count_rows(source: DataSource, folder: Path) -> int | None:
    """Records of a data entry if every row is of use; None where only reading the data would tell.

    Rows are counted after `skip` and `limit`, malformed ones included.

    Args:
        source: The entry.
        folder: Where relative paths start.
    """
    rows = None
    if isinstance(source, GeneratedData):
        rows = source.rows
    elif isinstance(source, FileData):
        rows = _in_file(folder / str(resolve_env(source.path)))
    if rows is None:
        return None
    rows = max(0, rows - source.skip)
    rows = rows if source.limit is None else min(rows, source.limit)
    if source.convert is None:
        return rows
    return rows * MADE_OF_A_ROW[source.convert] if source.convert in MADE_OF_A_ROW else None


def _in_file(path: Path) -> int | None:
    count = {".jsonl": _lines, ".ndjson": _lines, ".json": _items, ".csv": _table, ".tsv": _lines_but_one}
    name = path.name.lower().removesuffix(".gz")
    try:
        if Path(name).suffix not in count or path.stat().st_size > MAX_BYTES:
            return None
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            return count[Path(name).suffix](file)  # type: ignore[arg-type]
    except (OSError, EOFError, ValueError, csv.Error):  # whoever reads it for training tells what is wrong
        return None


def _lines(file: BinaryIO) -> int:
    return sum(1 for line in file if line.strip())


def _lines_but_one(file: BinaryIO) -> int:
    return max(0, _lines(file) - 1)


def _items(file: BinaryIO) -> int | None:
    content = file.read(MAX_BYTES + 1)
    value = json.loads(content) if len(content) <= MAX_BYTES else None
    if isinstance(value, dict):
        lists = [each for each in value.values() if isinstance(each, list)]
        value = lists[0] if len(lists) == 1 else None
    return len(value) if isinstance(value, list) else None


def _table(file: BinaryIO) -> int:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
    return max(0, sum(1 for cells in csv.reader(text) if cells) - 1)
