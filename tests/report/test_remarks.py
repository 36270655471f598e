from __future__ import annotations

from align.data import DataReport
from align.report.remarks import lengths, remarks


def test_everything_a_report_counts_is_told() -> None:
    report = DataReport(quarantined={"bad": 1200}, dropped={"duplicate": 2}, noted={"odd": 3}, contradictions=4)
    assert remarks(report.model_dump()) == [
        "1,200 quarantined: bad",
        "2 dropped: duplicate",
        "3 noted: odd",
        "4 pairs are the reverse of another",
    ]


def test_lengths_of_every_part() -> None:
    tokens = {"prompt": {"p50": 1, "p90": 2, "p99": 3, "max": 4000}, "total": {"p50": 5, "p90": 6, "p99": 7, "max": 8}}
    assert lengths(DataReport(tokens=tokens).model_dump()) == ["prompt 1 / 2 / 4,000", "total 5 / 6 / 8"]


def test_a_report_of_another_version_is_no_reason_to_fail() -> None:
    assert remarks({"quarantined": 3, "dropped": None}) == []
    assert lengths({"tokens": {"prompt": 7, "total": {"p50": float("nan")}}}) == []
