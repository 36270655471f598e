from __future__ import annotations

import pytest
from pydantic import ValidationError

from align.spec.stages import GenerationSettings


@pytest.mark.parametrize(("field", "value"), [("top_k", 5), ("top_p", 0.9)])
def test_greedy_decoding_reads_no_cut(field: str, value: float) -> None:
    def unread(**changes: float) -> list[str]:
        made = GenerationSettings(**changes)
        return [each.field for each in GenerationSettings.unread if each.when(made)]

    assert unread(**{field: value, "temperature": 0.0}) == [field]
    assert unread(**{field: value}) == unread(temperature=0.0) == []


@pytest.mark.parametrize("bad", [{"top_k": 0}, {"stop": [""]}, {"stop": "x"}], ids=str)
def test_values_that_mean_nothing_are_refused(bad: dict) -> None:
    with pytest.raises(ValidationError):
        GenerationSettings(**bad)


def test_what_came_later_is_left_out_of_fingerprints_at_its_default() -> None:
    fields = GenerationSettings.model_fields
    assert {n for n, field in fields.items() if (field.json_schema_extra or {}).get("added")} == {"top_k", "stop"}
