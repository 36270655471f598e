"""One pass over a data entry: rows become records, and those that do not are counted and kept for the quarantine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from align.data.convert import convert
from align.data.formats import Parser
from align.data.records import BadRow, Dropped, Record, identity
from align.data.sources import Row, Source, number_word, read_rows, source_name
from align.errors import DataError, RecipeError
from align.recipe.suggest import did_you_mean
from align.spec.data import FIELDS_OF_FORMAT, RECORDS_OF_CONVERSION, RECORDS_OF_FORMAT, can_convert

EXCERPT = 500
"""Characters of a malformed row that are kept."""

DUPLICATE = "duplicate"


class Reading:
    """Rows of a data entry on their way to records.

    Args:
        source: The entry.
        folder: Where relative paths start.

    Raises:
        RecipeError: A setting of the entry has no effect on its format, or its records cannot be converted.
    """

    def __init__(self, source: Source, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.rows_read = 0
        self.parsed = 0
        self.converted = 0
        self.quarantined: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._parser = Parser(source.format, source.columns, source.system)
        self._bad: list[tuple[int, str, str]] = []
        self._columns: dict[str, None] = {}
        if source.system and source.format == "text":
            raise RecipeError("plain text has no system message", where="system", fix="remove it")
        if not can_convert(source):
            assert source.convert is not None
            takes = " or ".join(RECORDS_OF_CONVERSION[source.convert][0])
            raise RecipeError(
                f"`{source.convert}` takes {takes} records, format {source.format} holds "
                f"{RECORDS_OF_FORMAT[source.format]} records",
                where="convert",
                fix="remove it, or choose another format",
            )

    @property
    def number_word(self) -> str:
        """What numbers of rows are called in messages."""
        return number_word(self.source)

    @property
    def noted(self) -> Counter[str]:
        return self._parser.noted

    def records(self, reduce: Callable[[Record], Record] | None = None) -> Iterator[tuple[Record, Row]]:
        """Every record with the row it was made from; later ones that say the same are dropped.

        Args:
            reduce: Applied to each record, in place of the entry's conversion.
        """
        seen: set[bytes] = set()
        for number, row in read_rows(self.source, self.folder):
            self.rows_read += 1
            if isinstance(row, BadRow):
                self.quarantine(number, row, {})
                continue
            self._columns.update(dict.fromkeys(row))
            try:
                record = self._parser.parse(number, row)
                made = [reduce(record)] if reduce else convert(record, self.source.convert)
            except BadRow as error:
                self.quarantine(number, error, row)
                continue
            except Dropped as error:
                self.parsed += 1
                self.drop(error)
                continue
            self.parsed += 1
            self.converted += len(made) - 1
            for each in made:
                if (key := identity(each)) in seen:
                    self.drop(Dropped(DUPLICATE))
                else:
                    seen.add(key)
                    yield each, row

    def quarantine(self, number: int, error: BadRow, row: Row) -> None:
        raw = error.raw if error.raw is not None else json.dumps(row, ensure_ascii=False, default=str)
        self.quarantined[error.reason] += 1
        self._bad.append((number, error.reason, raw[:EXCERPT]))

    def drop(self, error: Dropped) -> None:
        self.dropped[error.rule] += 1

    def finish(self, quarantine: Path | None, left: int = 1) -> None:
        """Write the quarantine and judge the whole.

        Args:
            quarantine: Where malformed rows go; an older file is removed if there are none.
            left: How many examples came of it.

        Raises:
            DataError: There are no rows, columns are missing, labels can be read in two ways, too many rows are
                malformed, or nothing is left.
        """
        name, word = source_name(self.source), self.number_word
        if quarantine is not None:
            self._write(quarantine, word)
        if not self.rows_read:
            raise DataError(f"no rows after skip: {self.source.skip}", where=name, fix="check the file and `skip`")
        self._check_columns(name)
        if {0.0, 1.0} == set(self._parser.labels):
            raise DataError(
                "the labels are 0 and 1: whether 0 is the first answer or a tie cannot be told",
                where=name,
                fix="write 1 for the first answer, 2 for the second, 0 for a tie",
            )
        bad = len({number for number, _, _ in self._bad})
        if bad > self.source.max_bad_rows * self.rows_read:
            first = "; ".join(f"{word} {number}: {reason}" for number, reason, _ in self._bad_once()[:3])
            kept = f"; all of them are in {quarantine}" if quarantine else ""
            raise DataError(
                f"{bad} of {self.rows_read} rows are malformed ({bad / self.rows_read:.2%}, max_bad_rows is "
                f"{self.source.max_bad_rows:.2%}): {first}{kept}",
                where=name,
                fix="mend the rows, or raise max_bad_rows if they may be left out",
            )
        if not left:
            raise DataError(
                f"nothing is left of {self.rows_read} rows: "
                + ", ".join(f"{count} {what}" for what, count in (self.quarantined + self.dropped).most_common()),
                where=name,
            )

    def _check_columns(self, name: str) -> None:
        """A column that no row has is a mistake of the whole file, not of its rows."""
        if not self._columns:
            return
        fields, columns = FIELDS_OF_FORMAT[self.source.format], self.source.columns
        found = ", ".join(self._columns)
        for field, column in columns.items():
            if field in fields.of_row and column not in self._columns:
                raise DataError(
                    f"no row has the column `{column}`{did_you_mean(column, self._columns)}",
                    where=f"{name}: columns.{field}",
                    fix=f"its columns: {found}",
                )
        missing = [[f for f in group if columns.get(f, f) not in self._columns] for group in fields.one_of]
        if all(missing):
            absent = min(missing, key=len)
            hint = did_you_mean(absent[0], self._columns)
            raise DataError(
                f"no row has {' and '.join(f'`{f}`' for f in absent)}, which format {self.source.format} needs{hint}",
                where=name,
                fix=f"map them with `columns: {{{absent[0]}: ...}}`; the columns are {found}",
            )

    def _bad_once(self) -> list[tuple[int, str, str]]:
        """Malformed rows in their order; a row that several records were made of is told once for each reason."""
        return sorted(set(self._bad))

    def _write(self, path: Path, word: str) -> None:
        path.unlink(missing_ok=True)
        if self._bad:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [{word: number, "reason": reason, "raw": raw} for number, reason, raw in self._bad_once()]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
