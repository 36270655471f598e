"""Rows of a data entry, one at a time: files, data sets of the Hub, generators."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
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
        RecipeError: The entry names a generator, a part or a kind of file that is not known.
        LaunchError: The Hub cannot be reached, or a variable is not set.
    """
    end = None if source.limit is None else source.skip + source.limit
    return islice(_all_rows(source, folder), source.skip, end)


def number_word(source: Source) -> str:
    """What counts rows: ``line`` (from 1) in files of lines, else ``row`` (from 0, as `skip` counts)."""
    lines = isinstance(source, FileData) and _kind(Path(str(resolve_env(source.path)))) in ("jsonl", "csv", "tsv")
    return "line" if lines else "row"


def source_name(source: Source) -> str:
    """What a message calls the entry; variables stay as they are written."""
    if isinstance(source, FileData):
        return source.path
    if isinstance(source, HubData):
        return f"{source.hub} ({source.split})"
    return f"{source.generator}/{source.part}"


def type_word(value: Any) -> str:
    """The type of a value in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _all_rows(source: Source, folder: Path) -> Rows:
    if isinstance(source, GeneratedData):
        yield from _generated(source)
    elif isinstance(source, HubData):
        yield from _hub(source)
    else:
        path = folder / str(resolve_env(source.path))
        try:
            yield from _READERS[_kind(path)](path)
        except FileNotFoundError:
            raise DataError(f"there is no file {path}", where="path", fix="check the path") from None
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path} cannot be read: {error}", where="path", fix="make it whole and readable"
            ) from error


def _kind(path: Path) -> str:
    name = path.name.lower()
    kind = FILE_KINDS.get(Path(name.removesuffix(".gz")).suffix)
    if kind is None or (kind == "parquet" and name.endswith(".gz")):
        raise RecipeError(
            f"{path.name} is no kind of file that can be read",
            where="path",
            fix=f"one of {', '.join(FILE_KINDS)}; the text files may be .gz",
        )
    return kind


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _as_row(value: Any) -> Row | BadRow:
    return value if isinstance(value, dict) else BadRow(f"not an object but {type_word(value)}", json.dumps(value))


def _jsonl(path: Path) -> Rows:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _parse_line(line.rstrip(b"\r\n"))


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
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError("not UTF-8", where=f"{path}:{line}", fix="convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and isinstance(_parse_line(content.split(b"\n", 1)[0]), dict):
            yield from enumerate(row for _, row in _jsonl(path))
            return
        raise DataError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}", fix="mend the file") from None
    except RecursionError:
        raise DataError("not JSON that can be read: too deep", where=str(path), fix="mend the file") from None
    if isinstance(value, dict):
        lists = [key for key, each in value.items() if isinstance(each, list)]
        if len(lists) == 1:
            value = value[lists[0]]
    if not isinstance(value, list):
        raise DataError(
            f"{type_word(value)}, not a list of rows or an object with one",
            where=str(path),
            fix="make it a list of objects, or one object per line in a .jsonl",
        )
    for number, each in enumerate(value):
        yield number, _as_row(each)


def _csv(path: Path, **dialect: Any) -> Rows:
    csv.field_size_limit(2**31 - 1)
    # Broken bytes become surrogates, which the cells that have them are refused for.
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, **dialect)
        header = next(reader, [])
        if twice := [name for name in header if header.count(name) > 1]:
            raise DataError(f"two columns are called {twice[0]!r}", where=f"{path}:1", fix="rename one")
        end = reader.line_num
        for cells in reader:
            number, end = end + 1, reader.line_num
            if len(cells) == len(header):
                yield number, dict(zip(header, cells, strict=True))
            elif cells:
                yield number, BadRow(f"{len(cells)} cells under {len(header)} columns", str(cells))


def _tsv(path: Path) -> Rows:
    """A tab separates and nothing quotes: quotation marks are text, as in the data sets that come as .tsv."""
    return _csv(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _parquet(path: Path) -> Rows:
    import datasets

    try:
        yield from enumerate(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True))
    except ValueError as error:
        raise DataError(f"not Parquet: {error}", where=str(path), fix="mend the file") from error


def _hub(source: HubData) -> Rows:
    import datasets

    name = str(resolve_env(source.hub))
    try:
        table = datasets.load_dataset(name, source.subset, split=source.split, revision=source.revision)
    except OSError as error:
        raise LaunchError(
            f"data set {source.hub!r} cannot be read: {error}",
            where="hub",
            fix="check the name and the connection, or download it and give its `path`",
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data set {source.hub!r}: {error}", where="hub", fix="check `split`, `subset` and `revision`"
        ) from error
    yield from enumerate(table)


def _generated(source: GeneratedData) -> Rows:
    known = plugins("align.generators")
    if source.generator not in known:
        raise RecipeError(
            f"nothing is registered as `{source.generator}` in align.generators{did_you_mean(source.generator, known)}",
            where="generator",
            fix=f"one of: {', '.join(known) or 'none is installed'}",
        )
    generator = plugin("align.generators", source.generator)()
    given = generator.parts.get(source.part)
    if given != source.format:
        raise RecipeError(
            f"part {source.part!r} of {source.generator} has the format {given}, not {source.format}"
            if given
            else f"{source.generator} has no part {source.part!r}{did_you_mean(source.part, generator.parts)}",
            where="format" if given else "part",
            fix=f"write format: {given}" if given else f"one of: {', '.join(generator.parts)}",
        )
    for number, row in enumerate(generator.generate(source.part, source.rows, source.seed, source.options)):
        yield number, _as_row(row)


_READERS: dict[str, Callable[[Path], Rows]] = {
    "json": _json,
    "jsonl": _jsonl,
    "parquet": _parquet,
    "csv": _csv,
    "tsv": _tsv,
}
