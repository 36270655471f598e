from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.errors import DataError, LaunchError, RecipeError, TrainingError
from align.recipe.sources import plugins
from align.scoring import Scorer, columns_read, get_scorer, labels, score_completion, score_label

PACKAGE = '''
class Short:
    """Prefers short answers."""

    def score(self, prompt, completion):
        return -float(len(completion))

class Named(Short):
    label = "gold"

class Mute:
    pass

class Letters(Short):
    reads = "answer"

ready = Short()
'''

ENTRIES = """[align.scorers]
short-answers = house_scorers:Short
ready = house_scorers:ready
named = house_scorers:Named
mute = house_scorers:Mute
letters = house_scorers:Letters
gone = house_scorers:Gone
absent = a_package_nobody_has:Scorer
"""


@pytest.fixture
def house_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that registers scorers, installed the way pip leaves one."""
    (tmp_path / "house_scorers.py").write_text(PACKAGE)
    info = tmp_path / "house_scorers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: house-scorers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "house_scorers", raising=False)
    plugins.cache_clear()
    yield
    plugins.cache_clear()


@pytest.mark.usefixtures("house_scorers")
@pytest.mark.parametrize("name", ["short-answers", "ready"], ids=["class", "object"])
def test_another_package_adds_a_scorer(name: str) -> None:
    scorer = get_scorer(name)
    assert isinstance(scorer, Scorer)
    assert scorer.score("Say hi.", "hi") == -2.0
    assert score_label(name, scorer) == name


@pytest.mark.usefixtures("house_scorers")
def test_a_scorer_may_name_its_column() -> None:
    assert score_label("named", get_scorer("named")) == "gold"


@pytest.mark.usefixtures("house_scorers")
def test_unknown_names_are_told_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"`short-answer`.*did you mean `short-answers`") as caught:
        get_scorer("short-answer")
    assert "ready" in str(caught.value.fix)


@pytest.mark.usefixtures("house_scorers")
def test_what_cannot_score_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"`mute` \(house_scorers:Mute\) has no method score"):
        get_scorer("mute")


@pytest.mark.usefixtures("house_scorers")
def test_columns_that_are_no_tuple_of_names_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"`letters` declares reads = 'answer'"):
        get_scorer("letters")


@pytest.mark.usefixtures("house_scorers")
@pytest.mark.parametrize("name", ["gone", "absent"])
def test_what_cannot_be_imported_is_told(name: str) -> None:
    with pytest.raises(LaunchError, match=f"`{name}`.*cannot be imported"):
        get_scorer(name)


def test_the_film_review_world_has_its_gold_reward() -> None:
    scorer = get_scorer("film-reviews")
    assert score_label("film-reviews", scorer) == "gold"


class Length:
    label = "size"

    def score(self, prompt: str, completion: str) -> float:
        return len(completion)


class Exact:
    label = "size"
    reads = ("answer", "weight")

    def score(self, prompt: str, completion: str, *, answer: str, weight: float) -> float:
        if not isinstance(answer, str):
            raise DataError("`answer` is no text", where="scorers", fix="write one")
        return weight * (completion == answer)


class Returns:
    def __init__(self, score: object) -> None:
        self.result = score

    def score(self, prompt: str, completion: str) -> object:
        return self.result


FIELDS = {"answer": "4", "weight": 2, "other": None}


def test_a_scorer_of_two_texts_is_called_with_two_texts() -> None:
    assert columns_read("length", Length()) == ()
    score = score_completion("length", Length(), "2+2?", "four", FIELDS, 0)
    assert score == 4.0
    assert type(score) is float


def test_a_scorer_is_given_the_columns_that_it_reads() -> None:
    assert columns_read("exact", Exact()) == ("answer", "weight")
    assert score_completion("exact", Exact(), "2+2?", "4", FIELDS, 0) == 2.0
    assert score_completion("exact", Exact(), "2+2?", "5", FIELDS, 0) == 0.0


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"weight": 1}, "the column `answer`, which is not there in row 7"),
        ({"weight": 1, "answers": "4"}, "`answer`, which is not there in row 7; did you mean `answers`?"),
        ({"weight": 1, "answer": None}, "the column `answer`, which is null in row 7"),
        ({"weight": 1, "answer": 4}, r"`answer` is no text \(row 7\)"),
    ],
)
def test_a_column_that_a_scorer_cannot_read_is_told_with_its_row(fields: dict[str, object], told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        score_completion("exact", Exact(), "2+2?", "4", fields, 7)
    assert caught.value.fix


@pytest.mark.parametrize("result", [None, True, "1", float("nan"), float("inf"), 1j, [1.0]])
def test_what_is_no_score_is_told_with_its_row(result: object) -> None:
    with pytest.raises(TrainingError, match=r"scorer `odd` returned .* for the prompt in row 7"):
        score_completion("odd", Returns(result), "2+2?", "4", {}, 7)


def test_labels_claimed_twice_give_way_to_names() -> None:
    assert labels({"a": Length(), "b": Exact(), "c": Returns(1)}) == {"a": "a", "b": "b", "c": "c"}
    assert labels({"a": Length(), "c": Returns(1)}) == {"a": "size", "c": "c"}
