from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from align.errors import ArtifactError
from align.report.page import write_report

VOID = {"meta", "br", "link", "img", "input", "hr"}
LOADING = {"src", "href", "action", "data", "poster", "srcset", "xlink:href", "formaction", "background", "style"}


class Page(HTMLParser):
    """The page as a browser would take it: elements, text, and every tag closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.elements, self._open = text, [], []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for name, a in self.elements if name == tag and attributes.items() <= a.items()]

    @property
    def told(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(folder: Path) -> Page:
    return Page(write_report(folder, folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def page(run: Any) -> Page:
    return page_of(run.folder)


def test_the_page_loads_nothing_and_runs_nothing(page: Page) -> None:
    targets = [value for _, attrs in page.elements for name, value in attrs.items() if name in LOADING]
    assert [target for target in targets if not str(target).startswith("#")] == []
    assert not {tag for tag, _ in page.elements} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    }
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    style = page.text.partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"url\(|@import|https?:", style)


def test_there_is_no_web_address_but_in_what_a_model_said(run: Any) -> None:
    samples = run.artifact("comparison") / "samples.jsonl"
    lines = [line for line in samples.read_text().splitlines() if "evil.example" not in line]
    (run.folder / "comparison").unlink()
    shutil.copytree(samples.parent, run.folder / "comparison")
    (run.folder / "comparison" / "samples.jsonl").write_text("\n".join(lines))
    assert not re.search(r"https?://", page_of(run.folder).text)


def test_the_content_policy_admits_the_one_style_sheet(page: Page) -> None:
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    style = page.text.partition("<style>")[2].partition("</style>")[0]
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy["content"] == (
        f"default-src 'none'; style-src 'sha256-{allowed}'; base-uri 'none'; form-action 'none'"
    )


def test_what_models_say_stays_text(page: Page) -> None:
    assert '<script src="https://evil.example/x.js">' in page.told
    assert "<b>The Copper Bridge</b>" in page.told
    assert page.all("img") == []
    assert page.all("b") == []


def test_korean_is_kept(page: Page) -> None:
    assert "별빛 등대는 조용하지만 오래 남는 영화입니다." in page.told


def test_links_within_the_page_arrive(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for a in page.all("a")} <= set(ids)


def test_everything_is_on_the_page(page: Page, run: Any) -> None:
    results = json.loads((run.artifact("comparison") / "results.json").read_text())
    gold = results["candidates"]["dpo"]["gold"]
    for part in (
        f"{gold['mean']:.3f}",
        f"{gold['low']:.3f}–{gold['high']:.3f}",
        "dpo scores highest on gold",
        "28 quarantined: field 'completion' is empty",
        "9 dropped: no room for a completion",
        "147 noted: input that says there is none",
        "completion 61 / 82 / 131",
        "Rewards · margin",
        "LoRA adapter of rank 16 on base, nf4",
        "every parameter trained",
        "${env:ALIGN_DATA}",
        "4 of 4",
        "9 min 6 s",
        "1.2 GiB",
        "transformers",
        "# the stage below",
    ):
        assert part in page.told
    figures = len(page.all("figure"))
    assert figures == 2 + 4 + 4 + 8
    assert len(page.all("svg", role="img")) == figures + 1


def test_the_recipe_is_shown_as_it_is_written(run: Any) -> None:
    shown = re.search(r'<pre class="yaml"><code>(.*?)</code></pre>', page_of(run.folder).text, flags=re.DOTALL)
    assert shown
    words = Page(f"<p>{shown[1]}</p>").words
    assert "".join(words).rstrip("\n") == (run.folder / "recipe.yaml").read_text().rstrip("\n")


@pytest.mark.parametrize("show", [1, 3])
def test_the_recipe_says_how_many_answers_are_shown(run: Any, show: int) -> None:
    recipe = run.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("show: 3", f"show: {show}"))
    page = page_of(run.folder)
    assert len(page.all("div", **{"class": "sample"})) == show
    assert f"the first {show} of 256 prompts, not picked" in page.told


@pytest.mark.parametrize("stage", ["base", "sft", "dpo", "comparison"])
def test_a_missing_stage_is_told_as_missing(run: Any, stage: str) -> None:
    (run.folder / stage).unlink()
    run.status(**{stage: {"state": "waiting", "fingerprint": "0" * 64, "work": ""}})
    page = page_of(run.folder)
    assert "3 of 4" in page.told
    assert page.all("span", **{"class": "chip waiting"}) != []


@pytest.mark.parametrize("name", ["manifest.json", "metrics.jsonl", "data.json", "recipe.yaml", "status.json"])
@pytest.mark.parametrize("content", [None, "", "{", "[1, 2]", "null"], ids=["gone", "empty", "cut", "list", "null"])
def test_a_damaged_file_leaves_a_page(run: Any, name: str, content: str | None) -> None:
    folder = run.artifact("dpo")
    path = run.folder / name if name in ("recipe.yaml", "status.json") else folder / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert "dpo scores highest on gold" in page_of(run.folder).told


@pytest.mark.parametrize("content", ["", "{", "[]", '{"candidates": 3}', '{"candidates": {}, "baseline": "sft"}'])
def test_damaged_results_leave_a_page(run: Any, content: str) -> None:
    (run.artifact("comparison") / "results.json").write_text(content)
    assert "Rewards · margin" in page_of(run.folder).told


def test_numbers_that_are_not_finite_are_told(run: Any) -> None:
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": float("inf")}]
    (run.artifact("dpo") / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = json.loads((run.artifact("comparison") / "results.json").read_text())
    results["candidates"]["dpo"]["gold"]["mean"] = float("nan")
    (run.artifact("comparison") / "results.json").write_text(json.dumps(results))
    page = page_of(run.folder)
    assert "2 values not finite, not drawn" in page.told
    assert not re.search(r"\b(nan|inf)\b", page.told)
    assert not [value for _, attrs in page.elements for value in attrs.values() if value and "nan" in value.split(",")]


def test_a_failed_stage_tells_why_and_shows_how_far_it_came(run: Any, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(run.artifact("dpo"), work, ignore=shutil.ignore_patterns("manifest.json", "seal.json", "data.json"))
    (run.folder / "dpo").unlink()
    error = "the loss is <nan> at step 40\n  fix: lower train.learning_rate"
    run.status(dpo={"state": "failed", "fingerprint": "3" * 64, "work": str(work), "message": error})
    page = page_of(run.folder)
    assert "the loss is <nan> at step 40" in page.told
    assert page.all("span", **{"class": "chip failed"}) != []
    assert "Rewards · margin" in page.told


def test_versions_that_differ_are_told_with_their_stages(run: Any) -> None:
    path = run.artifact("dpo") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"]["torch"] = "9.9.9"
    path.write_text(json.dumps(manifest))
    assert re.search(r"\(base, sft, comparison\); 9\.9\.9 \(dpo\)", page_of(run.folder).told)


def test_a_comparison_without_scorers_still_has_its_table(run: Any) -> None:
    path = run.artifact("comparison") / "results.json"
    results = json.loads(path.read_text())
    for own in results["candidates"].values():
        del own["gold"], own["win_rate"]
    path.write_text(json.dumps(results))
    page = page_of(run.folder)
    assert "KL (nats)" in page.told
    assert "scores highest" not in page.told


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    assert "Nothing has run here yet." in page_of(tmp_path).told


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run here"):
        write_report(tmp_path / "nowhere", tmp_path / "report.html")


def test_the_same_run_gives_the_same_page(run: Any, make_run: Callable[[], Any]) -> None:
    first = write_report(run.folder, run.folder / "report.html").read_bytes()
    assert write_report(run.folder, run.folder / "report.html").read_bytes() == first


def test_what_a_policy_wrote_on_the_way_is_shown(make_run: Callable[[], Any]) -> None:
    """Of a stage on rollouts: the first completion, one half way and the last, with their scores."""
    run = make_run()
    lines = [
        {"rollout": r, "step": 2 * r, "prompt": f"prompt {r}", "completion": f"said <b>{r}</b>", "score": r / 4}
        for r in range(5)
    ]
    artifact = run.artifact("dpo")
    (run.folder / "dpo").unlink()
    shutil.copytree(artifact, run.folder / "dpo")
    (run.folder / "dpo" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = page_of(run.folder).told
    assert [f"prompt {r}" in told for r in range(5)] == [True, False, True, False, True]
    assert "said <b>4</b>" in told
    assert "score 1.00" in told
