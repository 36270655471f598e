"""What a row has besides its prompt and its answers: what a verifier needs, several stages later too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS = "fields"
"""Where stages put the fields of the row that theirs was made from."""


def fields_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row's columns, and those that the entry renames under the names of its format, too.

    A row that a stage made hands on the fields of the row that it was made from.

    Args:
        row: As it was read.
        columns: Field -> column, where they differ.

    Example:
        >>> fields_of({"question": "2 + 2?", "result": "4"}, {"prompt": "question", "answer": "result"})
        {'question': '2 + 2?', 'result': '4', 'prompt': '2 + 2?', 'answer': '4'}
        >>> fields_of({"prompt": "2 + 2?", "responses": ["5"], "fields": {"answer": "4"}}, {})
        {'answer': '4'}
    """
    own = row.get(FIELDS)
    if isinstance(own, Mapping):
        return dict(own)
    return {**row, **{field: row[column] for field, column in columns.items() if column in row}}
