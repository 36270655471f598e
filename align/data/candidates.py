"""What the stages that score and select read, without a tokenizer: candidates, and conversations beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.fields import fields_of
from align.data.reading import Reading
from align.data.records import Conversation, Samples, digest
from align.data.report import DataReport
from align.data.sources import Row, Source

BESIDE = ("tokens", "logps")
"""What a row says of each candidate that is handed on as it is."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates of one prompt.

    Attributes:
        samples: The prompt and its candidates; errors name its row.
        origin: Number of the row that the prompt was first read from.
        beside: What else the row says of each, by name.
        fields: What it says besides, for a verifier.
    """

    samples: Samples
    origin: int
    beside: dict[str, list[Any]]
    fields: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        """The last user message: what a scorer sees."""
        return self.samples.prompt[-1]["content"]

    @property
    def scores(self) -> Sequence[float | None]:
        """Scores; of a list that has none, minus the place, for the best comes first."""
        scores = self.samples.scores
        return scores if scores is not None else [-float(place) for place in range(len(self.samples.responses))]

    def as_row(self) -> dict[str, Any]:
        """What a stage writes of them, scores apart."""
        own = self.samples
        row = {"row": self.origin, "prompt": own.prompt, "responses": own.responses, "sources": own.sources}
        target = {} if own.target is None else {"target": own.target}
        return {**row, "ended": own.ended, **self.beside, **target, "fields": dict(self.fields)}


def load_candidates(
    source: Source, *, folder: Path, quarantine: Path | None = None
) -> tuple[list[Candidates], DataReport]:
    """Candidates of a data entry, in the order of its rows; of ranked lists every one, equal and lone ones too.

    Args:
        source: The entry.
        folder: Where relative paths start.
        quarantine: File that malformed rows are written to.

    Raises:
        DataError: The source cannot be read, too many rows are malformed, or nothing is left.
    """
    reading = Reading(source.model_copy(update={"format": "samples"}), folder)
    found = [_candidates(record, row, source) for record, row in reading.records() if isinstance(record, Samples)]
    report = _report(reading, [each.samples for each in found], quarantine)
    report.candidates = sum(len(each.samples.responses) for each in found)
    return found, report


def load_conversations(
    source: Source, *, folder: Path, quarantine: Path | None = None
) -> tuple[list[Conversation], DataReport]:
    """Conversations of a data entry, in the order of its rows.

    Args:
        source: The entry.
        folder: Where relative paths start.
        quarantine: File that malformed rows are written to.

    Raises:
        DataError: The source cannot be read, too many rows are malformed, or nothing is left.
    """
    reading = Reading(source, folder)
    found = [record for record, _ in reading.records() if isinstance(record, Conversation)]
    return found, _report(reading, found, quarantine)


def _report(reading: Reading, records: Sequence[Samples | Conversation], quarantine: Path | None) -> DataReport:
    reading.finish(quarantine, left=len(records))
    return DataReport(
        rows_read=reading.rows_read,
        records=reading.parsed,
        converted=reading.converted,
        examples=len(records),
        quarantined=dict(reading.quarantined.most_common()),
        dropped=dict(reading.dropped.most_common()),
        noted=dict(reading.noted.most_common()),
        prompts=len({digest(record.prompt) for record in records}),
    )


def _candidates(record: Samples, row: Row, source: Source) -> Candidates:
    lists = {name: values for name in BESIDE if isinstance(values := row.get(name), list)}
    beside = {name: values for name, values in lists.items() if len(values) == len(record.responses)}
    origin = row.get("row")
    return Candidates(record, origin if isinstance(origin, int) else record.row, beside, fields_of(row, source.columns))
