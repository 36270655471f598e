"""What a stage that makes records left, for a page: its numbers, what became of candidates, its first records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from align.report.numbers import count, fixed, heading, short
from align.spec.kinds import OTHER_KINDS

Json = Mapping[str, Any]

SHOWN = 3
"""Records that a page shows of a stage."""
LONGEST_LIST = 8
"""Candidates that it shows of a record."""
COUNTS = ("prompts", "completions", "scored", "candidates", "pairs", "included", "conversations")
"""Metrics that are whole numbers, by how their names end or begin."""


def makes_records(kind: str) -> bool:
    """Whether stages of a kind make records."""
    return kind in OTHER_KINDS and OTHER_KINDS[kind].produces == "records"


def record_values(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Heading and value of everything that the manifest tells of the records."""
    return [(heading(name), count(value) if _is_count(name) else short(value)) for name, value in metrics.items()]


def _is_count(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last in COUNTS or last.removesuffix("_kept") in COUNTS


def selection_rows(selection: Json) -> list[tuple[str, str]]:
    """What became of candidates, prompts and pairs -> how many; empty for a stage that selects nothing."""
    if not isinstance(selection.get("kept"), int):
        return []
    rows = [("candidates kept", count(selection["kept"]))]
    for key, what in (("left", "candidates"), ("prompts", "prompts"), ("pairs", "pairs")):
        own = selection.get(key)
        rows += [(f"{what}: {why}", count(n)) for why, n in own.items()] if isinstance(own, dict) else []
    return rows


def shown_records(records: Sequence[Json]) -> list[dict[str, Any]]:
    """Prompt and answers of records, as the page shows them; what is none of ours is passed over."""
    shown = ({"prompt": _prompt(record), "answers": list(_answers(record))[:LONGEST_LIST]} for record in records)
    return [each for each in shown if each["answers"]]


def _prompt(record: Json) -> str:
    messages = record.get("messages", [{}])[:-1] if "messages" in record else record.get("prompt")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return str(messages[-1].get("content", ""))
    return messages if isinstance(messages, str) else ""


def _answers(record: Json) -> Iterator[dict[str, Any]]:
    if isinstance(record.get("responses"), list):
        for k, text in enumerate(record["responses"]):
            score, tokens = (_at(record.get(name), k) for name in ("scores", "tokens"))
            ended = _at(record.get("ended"), k)
            yield _answer(_at(record.get("sources"), k) or "candidate", text, score, tokens, ended is not False)
    elif "chosen" in record and "rejected" in record:
        for side in ("chosen", "rejected"):
            source = record.get(f"{side}_source")
            yield _answer(f"{side} ({source})" if source else side, record[side], record.get(f"{side}_score"))
    elif isinstance(record.get("messages"), list) and record["messages"]:
        text = record["messages"][-1].get("content", "")
        yield _answer(record.get("source") or "kept", text, record.get("score"))


def _at(values: Any, place: int) -> Any:
    return values[place] if isinstance(values, list) and place < len(values) else None


def _answer(who: Any, text: Any, score: Any = None, tokens: Any = None, ended: bool = True) -> dict[str, Any]:
    figures = [f"score {fixed(score, 2)}"] if isinstance(score, int | float) and math.isfinite(score) else []
    if isinstance(tokens, int):
        figures.append(f"{tokens} tokens" + ("" if ended else ", cut off"))
    return {"candidate": str(who), "text": str(text), "figures": figures}
