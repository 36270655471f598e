"""Checks plain values against a settings class and tells every mistake by its place, value and fix.

A slip (a misspelt key, kind or choice) is mended in a draft and the draft is checked again, so that a misspelt `data`
is one error and not two, and a misspelt `kind` does not hide what is wrong in the settings that all kinds share. What
only the likeliest kind would refuse is not told: the kind may have been another package's.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from align.errors import RecipeError
from align.recipe.explain import SLIP, VALUE, Problem, explain, outline_of, shown, told_apart_by
from align.recipe.origins import Loc, Origins
from align.recipe.shape import Spot, locate, models_in, options
from align.recipe.suggest import distance, nearest
from align.spec.stages import Stage

M = TypeVar("M", bound=BaseModel)

MAX_TOLD = 20
"""Errors told at once."""
MAX_SLIPS = 50
"""Slips mended before giving up; more than this is no recipe."""


def validate(model: type[M], data: Any, origins: Origins, at: Loc = ()) -> M:
    """Build a settings object from plain values.

    Args:
        model: The class.
        data: Plain values as read from YAML.
        origins: Where they were written.
        at: Place of `data` in the recipe.

    Raises:
        RecipeError: One that tells every mistake, slips first.
    """
    if not isinstance(data, dict):
        raise RecipeError(
            f"must be a mapping, not {shown(data)}", where=origins.where(at), fix="write `key: value` lines"
        )
    draft = _Draft(model, copy.deepcopy(data))
    problems: list[Problem] = []
    while (errors := draft.errors()) and len(problems) < MAX_SLIPS:
        slip = next((found for each in errors if (found := draft.slip(each))), None)
        if slip is None:
            problems += [draft.with_packages(each) for each in explain(model, draft.data, errors)]
            break
        problems.append(draft.mend(slip))
    if problems:
        raise combine(_told(problems, draft, origins, at))
    result: M = draft.result()
    return result


def combine(errors: list[RecipeError]) -> RecipeError:
    """One error whose text is the texts of all, the first one's place in front."""
    errors = list({str(error): error for error in errors}.values())
    first, rest = errors[0], errors[1:]
    if not rest:
        return first
    told = [f"{first.message}\n  fix: {first.fix}" if first.fix else first.message, *map(str, rest[: MAX_TOLD - 1])]
    if len(rest) >= MAX_TOLD:
        told.append(f"and {len(rest) - MAX_TOLD + 1} more")
    return RecipeError("\n".join(told), where=first.where)


def _told(problems: list[Problem], draft: _Draft, origins: Origins, at: Loc) -> list[RecipeError]:
    placed = [
        (problem.rank, origins.line(loc := at + draft.written(problem.loc)), loc, problem) for problem in problems
    ]
    return [
        RecipeError(problem.message, where=origins.where(loc), fix=problem.fix)
        for _, _, loc, problem in sorted(placed, key=lambda each: each[:2])
    ]


@dataclass(frozen=True)
class Slip:
    """A misspelt key (`key` is true) or value at `loc`, and the words it may stand for, nearest first."""

    loc: Loc
    word: str
    words: list[str]
    key: bool
    tag: bool = False
    """Whether it is the `kind` that says which class stands there."""


@dataclass
class _Draft:
    """The data with the slips found so far mended."""

    model: type[BaseModel]
    data: Any
    renamed: dict[Loc, str] = field(default_factory=dict)
    """Place in the draft -> key as written."""
    guessed: set[Loc] = field(default_factory=set)
    """Places of mappings whose `kind` was mended."""

    def errors(self) -> list[Any]:
        """What pydantic finds, apart from what only follows from a guess."""
        return [error for error in self._all_errors() if not self._follows_from_a_guess(error)]

    def _all_errors(self) -> list[Any]:
        try:
            self.result()
        except ValidationError as error:
            return list(error.errors(include_url=False))
        return []

    def _follows_from_a_guess(self, error: Any) -> bool:
        """Whether it is about a setting of the guessed class that no base class of several kinds has."""
        spot = locate(self.model, error["loc"]) if self.guessed else None
        place = next((at for at in self.guessed if spot and spot.loc[: len(at)] == at), None)
        if spot is None or place is None:
            return False
        inside = spot.loc[len(place) :]
        if not inside or (len(inside) == 1 and error["type"] in ("missing", "extra_forbidden")):
            return True
        model = next(each for loc, each in spot.models if loc == place)
        bases = [each.model_fields for each in model.__mro__[1:] if issubclass(each, BaseModel)]
        return not any(inside[0] in fields for fields in bases if "kind" not in fields)

    def result(self) -> Any:
        # The JSON mode is the strict mode that takes a list for a tuple and text for an enum.
        return self.model.model_validate_json(json.dumps(self.data), strict=True)

    def slip(self, error: Any) -> Slip | None:
        spot = locate(self.model, error["loc"])
        if error["type"] == "extra_forbidden" and spot.models:
            return self._key_slip(spot)
        if error["type"] == "union_tag_not_found":
            key = error["ctx"]["discriminator"].strip("'")
            words = [word for word in error["input"] if nearest(word, [key])]
            return Slip((*spot.loc, words[0]), words[0], [key], key=True) if words else None
        if error["type"] == "union_tag_invalid":
            key = error["ctx"]["discriminator"].strip("'")
            tags = [tag for m in models_in(spot.expected) if (tag := str(m.model_fields[key].default))]
            slip = self._value_slip((*spot.loc, key), tags)
            return slip and replace(slip, tag=True)
        if error["type"] == "literal_error" and not self._other_form(spot):
            union = next((annotation for loc, annotation, _ in spot.choices if loc == spot.loc), None)
            return self._value_slip(spot.loc, options(spot.expected if union is None else union))
        return None

    def _key_slip(self, spot: Spot) -> Slip | None:
        around, model = spot.models[-1]
        word, given = str(spot.loc[-1]), self.at(around)
        fields = set(model.model_fields)
        marks = {told_apart_by(each, spot) for each in (model, *spot.siblings)}
        if not marks & set(given):  # nothing says yet which of the classes is meant
            fields |= {name for sibling in spot.siblings for name in sibling.model_fields}
        words = nearest(word, sorted(fields - set(given)))
        taken = nearest(word, sorted(fields & set(given) - {word}))
        if not words or (taken and distance(word, taken[0]) < distance(word, words[0])):
            return None
        return Slip(spot.loc, word, words, key=True)

    def _value_slip(self, loc: Loc, known: list[Any]) -> Slip | None:
        word = self.at(loc)
        words = nearest(word, [each for each in known if isinstance(each, str)]) if isinstance(word, str) else []
        return Slip(loc, word, words, key=False) if words else None

    def _other_form(self, spot: Spot) -> bool:
        """Whether the value is written in a form that another member of the union takes."""
        return outline_of(self.at(spot.loc)) != "scalar"

    def mend(self, slip: Slip) -> Problem:
        """Put the likeliest word in place; among equally near ones, the one that leaves the fewest errors."""
        best = [word for word in slip.words if distance(slip.word, word) == distance(slip.word, slip.words[0])]
        chosen = min(best, key=lambda word: self._with(slip, word).faults()) if len(best) > 1 else best[0]
        mended = self._with(slip, chosen)
        written = slip.loc
        self.data, self.renamed = mended.data, mended.renamed
        if slip.tag:
            self.guessed.add(slip.loc[:-1])
        what = f"unknown key `{slip.word}`" if slip.key else f"{shown(slip.word)} is not one of the choices"
        loc = (*written[:-1], chosen) if slip.key else written
        others = [word for word in slip.words if word != chosen]
        fix = f"write `{chosen}`" + (f" (or {' or '.join(f'`{word}`' for word in others[:3])})" if others else "")
        problem = Problem(SLIP, loc, f"{what}; did you mean `{chosen}`?", fix)
        return self.with_packages(problem, slip.word) if slip.tag else problem

    def with_packages(self, problem: Problem, word: Any = None) -> Problem:
        """An unknown `kind` of a stage may be a method of a package that is not installed.

        Args:
            problem: Any problem.
            word: The value as written; absent, what the draft has there.
        """
        if problem.rank != (VALUE if word is None else SLIP) or problem.loc[-1:] != ("kind",):
            return problem
        kinds = models_in(locate(self.model, problem.loc[:-1]).expected)
        word = self.at(problem.loc) if word is None else word
        if not isinstance(word, str) or not any(issubclass(each, Stage) for each in kinds):
            return problem
        installed = f"install the package that provides `{word}`; `align methods` lists what there is"
        return replace(problem, fix=f"{problem.fix}, or {installed}")

    def faults(self) -> int:
        """How many mistakes are left when every slip is mended by its first word."""
        draft, mended = self, 0
        while (errors := draft._all_errors()) and mended < MAX_SLIPS:
            slip = next((found for each in errors if (found := draft.slip(each))), None)
            if slip is None:
                break
            draft, mended = draft._with(slip, slip.words[0]), mended + 1
        return len(errors) + mended

    def _with(self, slip: Slip, word: str) -> _Draft:
        draft = _Draft(self.model, copy.deepcopy(self.data), dict(self.renamed), set(self.guessed))
        around = draft.at(slip.loc[:-1])
        if slip.key:
            around[word] = around.pop(slip.word)
            draft.renamed[(*slip.loc[:-1], word)] = slip.word
        else:
            around[slip.loc[-1]] = word
        return draft

    def at(self, loc: Loc) -> Any:
        value = self.data
        for item in loc:
            value = value[item]
        return value

    def written(self, loc: Loc) -> Loc:
        """A place in the draft as it is written in the recipe."""
        return tuple(self.renamed.get(loc[: n + 1], item) for n, item in enumerate(loc))
