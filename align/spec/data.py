"""Where records come from and how their columns are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import Discriminator, Field, NonNegativeInt, PositiveInt, Tag

from align.spec.base import Registered, Settings, Unread, added, cosmetic

FILE_KINDS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
}
"""How a file is read, by the end of its name (a further `.gz` is taken off first)."""

Format = Literal[
    "text",
    "alpaca",
    "messages",
    "sharegpt",
    "prompt_completion",
    "pairs",
    "labelled_pairs",
    "ranked",
    "mt_bench",
    "samples",
    "unpaired",
    "prompts",
]

RECORDS_OF_FORMAT: dict[str, str] = {
    "text": "text",
    "alpaca": "conversation",
    "messages": "conversation",
    "sharegpt": "conversation",
    "prompt_completion": "conversation",
    "pairs": "pair",
    "labelled_pairs": "pair",
    "ranked": "ranked",
    "mt_bench": "ranked",
    "samples": "samples",
    "unpaired": "unpaired",
    "prompts": "prompt",
}
"""The record type each format is read as. What has a prompt also serves where a prompt is wanted."""

Conversion = Literal["all_pairs", "best_worst", "adjacent_pairs", "tournament", "unpaired", "best"]

RECORDS_OF_CONVERSION: dict[Conversion, tuple[tuple[str, ...], str]] = {
    "all_pairs": (("ranked",), "pair"),
    "best_worst": (("ranked",), "pair"),
    "adjacent_pairs": (("ranked",), "pair"),
    "tournament": (("ranked",), "pair"),
    "unpaired": (("pair", "ranked"), "unpaired"),
    "best": (("ranked", "pair"), "conversation"),
}
"""The record types that each conversion takes, and the one that it gives."""


@dataclass(frozen=True)
class Fields:
    """The fields that a format reads.

    Attributes:
        one_of: Groups of fields of which a row has to have one whole group.
        optional: Fields it may have besides.
        items: Fields of the objects in a list that a row has.
    """

    one_of: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    items: tuple[str, ...] = ()

    @property
    def of_row(self) -> list[str]:
        """The fields of the row itself."""
        return list(dict.fromkeys([*(name for group in self.one_of for name in group), *self.optional]))

    @property
    def names(self) -> list[str]:
        """All fields: what `columns` can rename."""
        return list(dict.fromkeys([*self.of_row, *self.items]))


_ALPACA = ("input", "history", "system")
"""What may stand beside an instruction."""

_CANDIDATES = tuple(
    (asked, answers)
    for answers in ("responses", "output")
    for asked in ("prompt", "conversations", "messages", "instruction")
)
"""A prompt and several answers to it."""

FIELDS_OF_FORMAT: dict[Format, Fields] = {
    "text": Fields((("text",),), ("weight",)),
    "alpaca": Fields((("instruction", "output"),), (*_ALPACA, "weight")),
    "messages": Fields((("messages",),), ("weight",)),
    "sharegpt": Fields((("conversations",),), ("system", "tools", "weight")),
    "prompt_completion": Fields((("prompt", "completion"),), ("weight",)),
    "pairs": Fields(
        (("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("instruction", "output")),
        ("conversations", *_ALPACA, "margin", "target", "weight"),
    ),
    "labelled_pairs": Fields(
        tuple(
            (asked, *answers, label)
            for answers in (("output_1", "output_2"), ("response1", "response2"))
            for label in ("label", "preference", "annotator1")
            for asked in ("prompt", "conversations", "messages", "instruction", "input")
        ),
        (*_ALPACA, "annotator2", "annotator3", "margin", "target", "weight"),
    ),
    "ranked": Fields(_CANDIDATES, (*_ALPACA, "scores", "target", "weight"), ("response", "score")),
    "mt_bench": Fields((("turns", "candidates"),), ("system", "weight")),
    "samples": Fields(_CANDIDATES, (*_ALPACA, "scores", "sources", "ended", "target"), ("response", "score")),
    "unpaired": Fields(
        (
            ("prompt", "completion", "label"),
            ("messages", "label"),
            ("conversations", "label"),
            ("instruction", "output", "label"),
        ),
        (*_ALPACA, "weight"),
    ),
    "prompts": Fields((("prompt",), ("messages",), ("conversations",), ("instruction",)), (*_ALPACA, "answer")),
}
"""What a row of each format is made of, and so what `columns` can rename."""


class DataSettings(Settings):
    """What all sources share."""

    unread: ClassVar[tuple[Unread, ...]] = (
        Unread(
            "system",
            lambda data: data.format == "text",
            "records of format text are no conversations",
            "remove it, or choose another format",
        ),
    )

    format: Format
    columns: dict[str, str] = Field(default_factory=dict)
    """field of the format -> column of the file, where they differ: {instruction: question}."""
    skip: NonNegativeInt = 0
    """Rows of the source to leave out at the start."""
    limit: PositiveInt | None = None
    """Rows of the source to read at most, after `skip`."""
    system: str | None = None
    """A system message put before every conversation that has none."""
    convert: Conversion | None = added(None)
    """What its records are made into: pairs of candidates (`all_pairs`, `best_worst`, `adjacent_pairs`, `tournament`),
    single completions (`unpaired`: the chosen one is desirable, the rejected one is not), or a conversation with the
    `best`.
    """
    max_bad_rows: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of malformed rows (quarantined) above which the run stops with exit code 3."""


class FileData(DataSettings):
    """A JSON, JSONL, Parquet or CSV file; `.gz` is understood."""

    path: str = cosmetic()
    """Path of the file, relative to the recipe; the content is hashed, not the path."""


class HubData(DataSettings):
    """A data set of the Hugging Face Hub."""

    hub: str
    split: str = "train"
    revision: str | None = None
    subset: str | None = None


class GeneratedData(DataSettings):
    """Rows made by a registered generator (entry point group `align.generators`)."""

    generator: Annotated[str, Registered("align.generators")]
    """Name of the generator."""
    part: str
    """Which of its parts."""
    rows: PositiveInt
    seed: NonNegativeInt = 0
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the generator itself; it rejects what it does not know."""


def records_of(source: DataSettings) -> str:
    """The record type that an entry holds, after its conversion."""
    return RECORDS_OF_FORMAT[source.format] if source.convert is None else RECORDS_OF_CONVERSION[source.convert][1]


def can_convert(source: DataSettings) -> bool:
    """Whether the records of the entry's format are what its conversion takes."""
    return source.convert is None or RECORDS_OF_FORMAT[source.format] in RECORDS_OF_CONVERSION[source.convert][0]


def _source(value: Any) -> str | None:
    keys = value if isinstance(value, dict) else getattr(value, "model_fields_set", ())
    return next((key for key in ("path", "hub", "generator") if key in keys), "path")


DataSource = Annotated[
    Union[
        Annotated[FileData, Tag("path")],
        Annotated[HubData, Tag("hub")],
        Annotated[GeneratedData, Tag("generator")],
    ],
    Discriminator(_source),
]
"""One entry of `data`: told apart by its key `path`, `hub` or `generator`."""
