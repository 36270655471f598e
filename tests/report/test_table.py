from __future__ import annotations

import json
from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from align.report.table import data_table, results_table, samples_table


def printed(table: Table, width: int = 100) -> str:
    out = StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


@pytest.fixture
def results(run: Any) -> dict[str, Any]:
    return json.loads((run.artifact("comparison") / "results.json").read_text())


@pytest.mark.parametrize("width", [80, 120])
def test_five_metrics_fit_a_terminal_whole(results: dict[str, Any], width: int) -> None:
    text = printed(results_table(results), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    gold = results["candidates"]["dpo"]["gold"]
    assert f"{gold['mean']:.3f} ↑" in text
    assert f"{gold['low']:.3f}–{gold['high']:.3f}" in text
    assert "256 held-out prompts, 95 % intervals" in text


def test_marks_only_where_the_difference_is_sure(results: dict[str, Any]) -> None:
    results["differences"]["dpo"]["gold"] |= {"low": -0.01, "high": 0.3}
    line = next(line for line in printed(results_table(results)).splitlines() if line.strip().startswith("dpo"))
    mean = f"{results['candidates']['dpo']['gold']['mean']:.3f}"
    assert mean in line
    assert f"{mean} ↑" not in line


def test_a_narrow_terminal_hides_no_digit(results: dict[str, Any]) -> None:
    assert "…" not in printed(results_table(results), 50)


def test_the_baseline_against_itself_is_no_number(results: dict[str, Any]) -> None:
    line = next(line for line in printed(results_table(results)).splitlines() if line.strip().startswith("sft"))
    assert line.split()[2:4] == ["–", "–"]


def test_a_single_candidate_needs_no_legend() -> None:
    own = {"kl": {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 4}}
    text = printed(results_table({"candidates": {"sft": own}, "baseline": "sft", "n": 4}))
    assert "differs" not in text


def test_data_table_tells_what_was_left_out(run: Any) -> None:
    report = json.loads((run.artifact("sft") / "data.json").read_text())
    text = printed(data_table(report))
    assert "28 quarantined: field 'completion' is empty" in text
    assert "9 dropped: no room for a completion" in text
    assert "147 noted: input that says there is none" in text


def test_data_table_survives_an_empty_report() -> None:
    assert printed(data_table({"corpus": {}})).split()[-5:] == ["corpus", *"––––"]


def test_samples_stand_side_by_side_and_markup_stays_text() -> None:
    samples = [
        {"prompt": "Say [bold]hi[/bold]", "answers": {"sft": {"text": "[red]안녕", "scores": {"gold": 0.25}}}},
        {"prompt": "Say no", "answers": {"dpo": {"text": "no"}}},
    ]
    text = printed(samples_table(samples))
    for part in ("sft", "dpo", "[bold]hi[/bold]", "[red]안녕", "gold 0.25"):
        assert part in text
