"""A user's function: loaded only where allowed, checked before it is called, its errors told with its own lines."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from align.errors import AlignError, DataError, RecipeError, TrainingError
from align.scoring import Scorer, columns_read, load_function, score_completion, score_label

SOURCE = """from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Weights:
    right: float = 2.0


def exact(prompt: str, completion: str, answer: str) -> float:
    return Weights().right * (completion.strip() == answer)


def by_name(prompt, completion, *, answer, unit):
    return float(completion == answer + unit)


def short(question, reply, /):
    return -len(reply)


def brittle(prompt, completion, answer):
    return helper(completion) / len(answer)


def helper(completion):
    return int(completion)


def leaves(prompt, completion):
    raise SystemExit(0)


def says_yes(prompt, completion):
    return True


async def later(prompt, completion):
    return 1.0


def many(prompt, completion):
    yield 1.0


def one(prompt):
    return 1.0


def named(*, prompt, completion):
    return 1.0


def all_of_them(prompt, completion, **fields):
    return 1.0


def perhaps(prompt, completion, answer=None):
    return 1.0


def rest(prompt, completion, *texts):
    return 1.0


constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scorers").mkdir()
    (tmp_path / "scorers" / "mine.py").write_text(SOURCE, encoding="utf-8")
    return tmp_path


def loaded(folder: Path, function: str) -> Scorer:
    return load_function(f"scorers/mine.py:{function}", folder, allowed=True)


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(SOURCE.splitlines(), start=1) if text in line)


def test_a_function_scores(folder: Path) -> None:
    scorer = loaded(folder, "exact")
    assert isinstance(scorer, Scorer)
    assert columns_read("exact", scorer) == ("answer",)
    assert score_label("scorers/mine.py:exact", scorer) == "exact"
    assert score_completion("exact", scorer, "2+2?", " 4\n", {"answer": "4", "other": 1}, 0) == 2.0
    assert score_completion("exact", scorer, "2+2?", "5", {"answer": "4"}, 0) == 0.0


def test_columns_by_name_and_texts_by_place(folder: Path) -> None:
    assert columns_read("by_name", loaded(folder, "by_name")) == ("answer", "unit")
    assert score_completion("by_name", loaded(folder, "by_name"), "?", "4m", {"answer": "4", "unit": "m"}, 0) == 1.0
    assert score_completion("short", loaded(folder, "short"), "?", "four", {}, 0) == -4.0


def test_the_digest_is_that_of_the_bytes(folder: Path) -> None:
    digest = hashlib.sha256(SOURCE.encode()).hexdigest()
    assert loaded(folder, "exact").digest == digest
    assert load_function("scorers/mine.py:exact", folder, allowed=True, digest=digest).digest == digest
    with pytest.raises(RecipeError, match="has changed since"):
        load_function("scorers/mine.py:exact", folder, allowed=True, digest="0" * 64)


def test_nothing_runs_unless_it_is_allowed(folder: Path) -> None:
    (folder / "trap.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\ndef score(prompt, completion): return 1.0\n")
    with pytest.raises(RecipeError, match="nothing said that it may run") as caught:
        load_function("trap.py:score", folder, allowed=False)
    assert "--allow-code" in str(caught.value.fix)
    with pytest.raises(RecipeError, match="has changed"):
        load_function("trap.py:score", folder, allowed=True, digest="0" * 64)
    assert not (folder / "ran").exists()
    load_function("trap.py:score", folder, allowed=True)
    assert (folder / "ran").exists()


def test_nothing_is_left_beside_the_file_or_on_the_path(folder: Path) -> None:
    before = list(sys.path)
    loaded(folder, "exact")
    assert sys.path == before
    assert [each.name for each in (folder / "scorers").iterdir()] == ["mine.py"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mine", "names no function"),
        ("scorers/mine.py", "names no function"),
        ("scorers/mine.py:", "names no function"),
        ("scorers/mine.py:a.b", "names no function"),
        ("scorers/mine.txt:exact", "names no function"),
        ("mine.py:exact", "there is no file"),
        ("scorers/mine.py:exat", "no function `exat` in it; did you mean `exact`?"),
        ("scorers/mine.py:constant", "`constant` is no plain function"),
        ("scorers/mine.py:Weights", "`Weights` is no plain function"),
        ("scorers/mine.py:later", "`later` is no plain function"),
        ("scorers/mine.py:many", "`many` is no plain function"),
        ("scorers/mine.py:one", "does not take a prompt and a completion"),
        ("scorers/mine.py:named", "does not take a prompt and a completion"),
        ("scorers/mine.py:all_of_them", r"`\*\*fields` of `all_of_them`"),
        ("scorers/mine.py:perhaps", "`answer=None` of `perhaps`"),
        ("scorers/mine.py:rest", r"`\*texts` of `rest`"),
    ],
)
def test_what_is_no_scorer_is_refused(folder: Path, name: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told) as caught:
        load_function(name, folder, allowed=True)
    assert caught.value.fix


def test_a_wrong_signature_is_told_with_its_line(folder: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        loaded(folder, "perhaps")
    assert caught.value.where == f"{folder / 'scorers' / 'mine.py'}:{line_of('def perhaps')}"


@pytest.mark.parametrize(
    ("source", "line", "told"),
    [
        ("x = 1\ndef score(:\n", 2, "SyntaxError: "),
        ("\n\nx = 1 / 0\n", 3, "ZeroDivisionError: division by zero"),
        ("def f():\n    raise ValueError\nf()\n", 2, "ValueError"),
        ("import a_package_nobody_has\n", 1, "ModuleNotFoundError: No module named"),
        ("\nraise SystemExit(0)\n", 2, "SystemExit: 0"),
        ("x = '\0'\n", 1, "null bytes"),
    ],
)
def test_a_file_that_does_not_run_is_told_with_its_line(tmp_path: Path, source: str, line: int, told: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(RecipeError, match=told) as caught:
        load_function("broken.py:score", tmp_path, allowed=True)
    assert caught.value.where == f"{path}:{line}"
    assert "Traceback" not in str(caught.value)


def test_a_file_in_no_encoding_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_bytes(b"x = '\xff\xfe'\n")
    with pytest.raises(RecipeError, match="SyntaxError"):
        load_function("broken.py:score", tmp_path, allowed=True)


def test_what_it_raises_is_told_with_its_line_and_the_row(folder: Path) -> None:
    scorer = loaded(folder, "brittle")
    path = folder / "scorers" / "mine.py"
    with pytest.raises(DataError, match=r"`brittle` raised ValueError: invalid literal.*\(row 9\)") as caught:
        score_completion("brittle", scorer, "?", "four", {"answer": "4"}, 9)
    assert caught.value.where == f"{path}:{line_of('return int(completion)')}"
    with pytest.raises(DataError, match="ZeroDivisionError") as caught:
        score_completion("brittle", scorer, "?", "4", {"answer": ""}, 9)
    assert caught.value.where == f"{path}:{line_of('return helper')}"


def test_leaving_the_process_is_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match="SystemExit: 0"):
        score_completion("leaves", loaded(folder, "leaves"), "?", "4", {}, 9)


def test_what_is_no_score_is_told(folder: Path) -> None:
    with pytest.raises(TrainingError, match="`says_yes` returned True for the prompt in row 9"):
        score_completion("says_yes", loaded(folder, "says_yes"), "?", "4", {}, 9)


def test_errors_of_align_pass(folder: Path) -> None:
    source = "from align.errors import DataError\ndef score(prompt, completion): raise DataError('no text', fix='x')\n"
    (folder / "house.py").write_text(source)
    with pytest.raises(AlignError, match=r"^no text \(row 9\)"):
        score_completion("house", load_function("house.py:score", folder, allowed=True), "?", "4", {}, 9)
