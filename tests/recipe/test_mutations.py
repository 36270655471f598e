"""One edit breaks a recipe: it is refused in the line of the edit, in plain words, with the word that was meant."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from align.errors import RecipeError
from align.recipe import build_graph, load_recipe
from tests.recipe.mutations import Broken, key_typos, spots, value_typos, wrong_types, yaml_tricks

VALID = Path(__file__).parent / "valid"
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SOURCES = [*sorted(VALID.glob("*.yaml")), *sorted(RECIPES.rglob("*.yaml"))]

Refusal = Callable[[Broken], str | None]


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refusal:
    """The message that a broken recipe gets; None if it is taken for a good one."""
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path / "data"))
    shutil.copy(VALID / "rows.jsonl", tmp_path)
    for source in SOURCES:
        for name in re.findall(r"\$\{env:ALIGN_DATA\}/([\w./-]+)", source.read_text(encoding="utf-8")):
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def told(broken: Broken) -> str | None:
        path = tmp_path / "recipe.yaml"
        path.write_text(broken.text, encoding="utf-8")
        try:
            build_graph(load_recipe(path), tmp_path / "home")
        except RecipeError as error:
            return str(error).replace(f"{tmp_path}/", "")
        return None

    return told


def broken_by(how: Callable[..., Iterator[Broken]], source: Path, seed: int) -> Iterator[Broken]:
    """The mutations of a recipe; words that it uses itself are no slips."""
    text = source.read_text(encoding="utf-8")
    rng = random.Random(f"{source.name}/{seed}")
    if how in (key_typos, value_typos):
        return how(text, rng, {spot.node.value for spot in spots(text)})
    return how(text, rng)


def check(broken: Broken, told: str | None) -> None:
    assert told is not None, f"accepted: {broken.how} in line {broken.line}"
    first = told.splitlines()[0]
    if broken.line:
        assert re.match(rf"recipe\.yaml:{broken.line}\b", first), f"{broken.how} in line {broken.line}:\n{told}"
    for word in ("Input should", "Extra inputs", "Field required", "NoneType", "Traceback", "pydantic"):
        assert word not in told


sources = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


@sources
def test_recipes_as_they_are_have_no_mistake(source: Path, refusal: Refusal) -> None:
    assert refusal(Broken("nothing", source.read_text(encoding="utf-8"), 0)) is None


@pytest.mark.parametrize("how", [key_typos, value_typos], ids=lambda how: how.__name__)
def test_typos_are_found_in_their_line_and_told_with_the_word_that_was_meant(
    how: Callable[..., Iterator[Broken]], refusal: Refusal
) -> None:
    guessed = []
    for broken in (each for source in SOURCES for each in broken_by(how, source, seed=0)):
        told = refusal(broken)
        check(broken, told)
        guessed.append(f"did you mean `{broken.meant}`" in (told or "").splitlines()[0])
    assert len(guessed) >= 60
    # Of two words that are equally near, the wrong one may be guessed.
    assert sum(guessed) >= 0.95 * len(guessed)


@sources
def test_wrong_types_are_found_in_their_line(source: Path, refusal: Refusal) -> None:
    for broken in broken_by(wrong_types, source, seed=0):
        check(broken, refusal(broken))


@sources
def test_what_is_no_recipe_is_refused_in_its_line(source: Path, refusal: Refusal) -> None:
    all_tricks = list(broken_by(yaml_tricks, source, seed=0))
    tricks = {broken.how: broken for broken in all_tricks}  # one of each kind, and a sample of all
    for broken in [*tricks.values(), *random.Random(0).sample(all_tricks, min(12, len(all_tricks)))]:
        check(broken, refusal(broken))


@pytest.mark.parametrize("seed", range(40))
def test_noise_never_escapes_as_another_error(seed: int, refusal: Refusal) -> None:
    """Ten random edits anywhere: a recipe or a mistake, never a crash."""
    rng = random.Random(seed)
    text = list(rng.choice(SOURCES).read_text(encoding="utf-8"))
    for _ in range(10):
        at = rng.randrange(len(text))
        text[at] = rng.choice(["", text[at] * 2, *"{}[]:,&*!|>'\"%@`#?-~ \n\t0aé\u2028\U0001f600"])
    refusal(Broken("noise", "".join(text), 0))
