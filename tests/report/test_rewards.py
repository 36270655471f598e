"""A reward model in the report and in the terminal."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from rich.console import Console

from align.artifacts.manifest import Manifest, PolicyRecord
from align.evaluation.reward import Judged, evaluate_rewards
from align.report.page import write_report
from align.report.plots import reliability_plot
from align.report.rewards import reward_figures, reward_values
from align.report.table import rewards_table
from align.runner.folder import RunFolder
from align.runner.results import run_evaluations, run_results, show_results
from align.spec.model import LoraSettings, ModelSettings
from tests.report.conftest import HOSTILE, FakeRun


def evaluation(n: int = 60, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    pairs = [Judged((m, 0.0), (1.0, 0.0), (12, 9)) for m in rng.normal(0.8, 1.0, n)]
    return {"on": "held-out"} | evaluate_rewards(pairs, resamples=200)


NORMALIZATION = {"mean": 0.4, "std": 1.25, "n": 2400, "on": "data"}


def add_reward(run: FakeRun, content: dict, *, adapter: bool = True) -> None:
    model = ModelSettings(base="base", adapter=LoraSettings() if adapter else "none")
    record = PolicyRecord(base="1" * 64 if adapter else "e" * 64, base_kind="stage", adapter=adapter, model=model)
    run.add(
        Manifest(kind="reward", stage="rm", recipe="quickstart", fingerprint="e" * 64, reward=record, created="2026"),
        {"evaluation.json": content, "normalization.json": NORMALIZATION, "metrics.jsonl": [{"step": 1, "loss": 0.7}]},
    )


def test_the_page_has_the_numbers_and_the_diagram(run: FakeRun) -> None:
    found = evaluation()
    add_reward(run, found)
    page = write_report(run.folder, run.folder / "report.html").read_text()
    article = page[page.index("<h3>rm ") :]
    article = article[: article.index("</article>")]
    accuracy = found["accuracy"]
    assert f"{accuracy['mean']:.3f}  ({accuracy['low']:.3f}–{accuracy['high']:.3f})" in article
    assert "60 held-out pairs" in article
    assert "2,400 completions (data): 0.4 ± 1.25" in article
    assert "LoRA adapter of rank 16 and a scalar head on base" in article
    assert "Right against sure" in article
    assert article.count("<circle") >= sum(b["n"] > 0 for b in found["calibration"]["bins"])


@pytest.mark.parametrize(
    "content",
    [{}, {"on": "training"}, {"calibration": None, "length": {"pearson": None}, "accuracy": {"mean": "x"}}],
    ids=["none", "little", "odd"],
)
def test_a_page_is_made_of_whatever_is_there(run: FakeRun, content: dict) -> None:
    add_reward(run, content, adapter=False)
    page = write_report(run.folder, run.folder / "report.html").read_text()
    assert "every parameter trained, a scalar head too" in page
    assert "Right against sure" not in page


def test_nothing_of_a_file_is_taken_as_markup(run: FakeRun) -> None:
    add_reward(run, evaluation() | {"on": HOSTILE})
    assert "<script" not in write_report(run.folder, run.folder / "report.html").read_text()


def test_the_diagram_puts_a_calibrated_model_on_the_diagonal() -> None:
    svg = reliability_plot([(0.6, 0.6, 10), (0.9, 0.9, 40), (0.75, 0.4, 1)], title="t")
    root = ET.fromstring(svg)
    (diagonal,) = [e for e in root.iter("line") if e.get("class") == "reference"]
    x1, x2, y1, y2 = (float(diagonal.get(k, "nan")) for k in ("x1", "x2", "y1", "y2"))
    dots = [
        (float(e.get("cx", "nan")), float(e.get("cy", "nan")), float(e.get("r", "nan"))) for e in root.iter("circle")
    ]
    off = [y - (y1 + (x - x1) / (x2 - x1) * (y2 - y1)) for x, y, _ in dots]
    assert off[:2] == pytest.approx([0, 0], abs=0.02)
    assert off[2] > 10, "it is sure and wrong: below the diagonal"
    assert dots[1][2] > dots[0][2] > dots[2][2], "more pairs, a larger dot"


def test_the_terminal_shows_reward_models_beside_comparisons(run: FakeRun) -> None:
    found = evaluation()
    add_reward(run, found)
    folder = RunFolder(run.folder)
    assert list(run_evaluations(folder)) == ["rm"]
    assert list(run_results(folder)) == ["comparison"]
    console = Console(record=True, width=140)
    show_results(folder, console)
    text = console.export_text()
    assert re.search(rf"Pair accuracy +{found['accuracy']['mean']:.3f}", text)
    assert "Calibration error" in text
    assert "dpo" in text, "the comparison is there too"


def test_several_reward_models_are_columns() -> None:
    table = rewards_table({"a": evaluation(), "b": {"on": "training", "pairs": 3}})
    assert [column.header for column in table.columns] == ["reward model", "a", "b"]
    assert str(list(table.columns[2].cells)[1]) == "–"
    assert dict(reward_values({"on": "training", "pairs": 3})) == {"Judged on": "3 training pairs"}
    assert reward_values({}) == reward_figures({}) == []
