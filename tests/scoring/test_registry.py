from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.errors import LaunchError, RecipeError
from align.recipe.sources import plugins
from align.scoring import Scorer, get_scorer, score_label

PACKAGE = '''
class Short:
    """Prefers short answers."""

    def score(self, prompt, completion):
        return -float(len(completion))

class Named(Short):
    label = "gold"

class Mute:
    pass

ready = Short()
'''

ENTRIES = """[align.scorers]
short-answers = house_scorers:Short
ready = house_scorers:ready
named = house_scorers:Named
mute = house_scorers:Mute
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
@pytest.mark.parametrize("name", ["gone", "absent"])
def test_what_cannot_be_imported_is_told(name: str) -> None:
    with pytest.raises(LaunchError, match=f"`{name}`.*cannot be imported"):
        get_scorer(name)


def test_the_film_review_world_has_its_gold_reward() -> None:
    scorer = get_scorer("film-reviews")
    assert score_label("film-reviews", scorer) == "gold"
