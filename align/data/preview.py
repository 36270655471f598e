"""Data as training will see it, for a terminal: records, token masks, and what became of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from align.data.chat import Completion, Example
from align.data.reading import Reading
from align.data.records import Conversation, Message, Pair, Prompt, Ranked, Record, Samples, Unpaired
from align.data.report import DataReport, is_pair
from align.data.sources import Source, number_word

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED = "bold green"
CONTEXT = "dim"
OPEN, CLOSE = "⟦", "⟧"
"""Around trained text, so that it can be told from context without colours."""

ROLE_STYLES = {"system": "magenta", "user": "cyan", "assistant": "green"}


def preview_records(source: Source, folder: Path, rows: int) -> RenderableType:
    """The first rows of a data entry as records; no tokenizer is needed.

    Raises:
        DataError: The source cannot be read, or its rows are no records.
    """
    reading = Reading(source, folder)
    found = [record for record, _ in islice(reading.records(), rows)]
    if not found:
        reading.finish(None, left=0)
    left_out = reading.quarantined + reading.dropped
    notes = [Text(f"left out on the way: {count} {what}", style="yellow") for what, count in left_out.items()]
    return Group(*(_panel(record, reading.number_word) for record in found), *notes)


def preview_masks(source: Source, examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> RenderableType:
    """Examples of a data entry decoded, what is trained in brackets and colour."""
    word = number_word(source)
    legend = Text.assemble(("prompt and context", CONTEXT), "   ", (f"{OPEN}trained{CLOSE}", TRAINED))
    return Group(legend, *(_masked(example, tokenizer, word) for example in examples))


def report_tables(name: str, report: DataReport, shared: Mapping[str, int] | None = None) -> RenderableType:
    """What became of the rows of a data entry, and how long they are in tokens.

    Args:
        name: What the recipe calls the entry.
        report: Its report.
        shared: Another entry of the recipe -> how many examples here have a prompt that is also there.
    """
    counts = Table(title=f"data {name}", title_justify="left", show_header=False)
    counts.add_column("what")
    counts.add_column("rows", justify="right")
    counts.add_row("rows read", f"{report.rows_read:,}")
    if report.converted:
        counts.add_row("made of them by `convert` besides", f"+{report.converted:,}")
    for title, rows in (("quarantined", report.quarantined), ("dropped", report.dropped)):
        for reason, count in rows.items():
            counts.add_row(f"{title}: {reason}", f"-{count:,}")
    counts.add_row("examples", f"{report.examples:,}", style="bold", end_section=True)
    for reason, count in report.noted.items():
        counts.add_row(reason, f"{count:,}")
    share = report.truncated / report.examples if report.examples else 0.0
    counts.add_row(f"truncated ({share:.1%})", f"{report.truncated:,}")
    counts.add_row("different prompts", f"{report.prompts:,}")
    if report.candidates > 2 * report.examples:
        counts.add_row("candidates", f"{report.candidates:,}")
    if report.desirable:
        counts.add_row("desirable", f"{report.desirable:,}")
    if report.contradictions:
        counts.add_row("judgements that another one turns round", f"{report.contradictions:,}")
    for other, count in (shared or {}).items():
        counts.add_row(f"prompts that `{other}` has as well", f"{count:,}")
    return Group(counts, _lengths(report)) if report.tokens else counts


def _lengths(report: DataReport) -> Table:
    names = list(next(iter(report.tokens.values())))
    table = Table(title="tokens", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for part, values in report.tokens.items():
        table.add_row(part, *(f"{values[name]:,}" for name in names))
    return table


def _panel(record: Record, word: str) -> Panel:
    body = Text()
    if isinstance(record, Conversation | Prompt):
        _add_messages(body, record.messages)
    elif isinstance(record, Pair | Ranked | Samples | Unpaired):
        _add_messages(body, record.prompt)
        for name, messages in _answers(record):
            body.append(f"{name}\n", style="bold yellow")
            _add_messages(body, messages)
    else:
        body.append(record.text)
    weight = "" if isinstance(record, Prompt | Samples) or record.weight == 1 else f", weight {record.weight:g}"
    margin = f", margin {record.margin:g}" if isinstance(record, Pair) and record.margin else ""
    body.rstrip()
    return Panel(body, title=f"{word} {record.row}{weight}{margin}", title_align="left")


def _answers(record: Pair | Ranked | Samples | Unpaired) -> list[tuple[str, list[Message]]]:
    """The answers of a record with what is said of them."""
    if isinstance(record, Unpaired):
        return [("desirable" if record.label else "undesirable", record.completion)]
    if isinstance(record, Pair):
        answers = [("chosen", record.chosen), ("rejected", record.rejected)]
    elif isinstance(record, Samples):
        names = [_said_of(record, k) for k in range(len(record.responses))]
        answers = [(n, [Message(role="assistant", content=r)]) for n, r in zip(names, record.responses, strict=True)]
    else:
        names = [f"score {score:g}" for score in record.scores]
        answers = list(zip(names, record.responses, strict=True))
    return [*answers, ("target", record.target)] if record.target else answers


def _add_messages(body: Text, messages: Iterable[Message]) -> None:
    for message in messages:
        body.append(f"{message['role']}\n", style=f"bold {ROLE_STYLES[message['role']]}")
        body.append(f"{message['content']}\n")


def _said_of(record: Samples, k: int) -> str:
    """Where a candidate comes from and how good it is, as far as anything tells."""
    score = record.scores[k] if record.scores is not None else None
    told = [record.sources[k], "" if score is None else f"score {score:g}", "" if record.ended[k] else "cut off"]
    return ", ".join(each for each in told if each) or "candidate"


def _masked(example: Example, tokenizer: PreTrainedTokenizerBase, word: str) -> Panel:
    body = Text(_decode(tokenizer, example.prompt_ids), style=CONTEXT)
    for name, completion in zip(_names(example), example.completions, strict=False):
        if name:
            body.append(f"\n{name} ", style="bold yellow")
        _add_completion(body, completion, tokenizer)
    trained = [sum(completion.mask) for completion in example.completions]
    told = f"prompt {len(example.prompt_ids)} tokens, trained {' and '.join(map(str, trained))}"
    return Panel(body, title=f"{word} {example.row}: {told}", title_align="left")


def _names(example: Example) -> list[str]:
    """What each completion of an example is called."""
    if is_pair(example):
        return ["chosen", "rejected", "target"]
    if len(example.scores) == 1:
        return ["desirable" if example.scores[0] else "undesirable", "of another prompt, not trained"]
    return [*(f"score {score:g}" for score in example.scores), "target" if example.scores else ""]


def _add_completion(body: Text, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> None:
    for on, run in groupby(zip(completion.ids, completion.mask, strict=True), key=lambda pair: pair[1]):
        text = _decode(tokenizer, [token for token, _ in run])
        body.append(f"{OPEN}{text}{CLOSE}" if on else text, style=TRAINED if on else CONTEXT)
    if completion.truncated:
        body.append(" (truncated)", style="bold red")


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
