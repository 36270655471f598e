"""Settings that were written and that nothing reads, declared beside the class that owns them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar, Literal

import pytest

import align.methods
from align.methods import method
from align.recipe import Graph
from align.recipe.ignored import declared
from align.recipe.schema import recipe_model, stage_kinds
from align.spec.base import DataRef, Settings, Unread
from align.spec.stages import TrainedStage
from align.spec.train import TrainSettings
from align.types import Batch, LossOutput, Needs, TokensLogps

Check = Callable[..., Graph]
Refuse = Callable[..., str]

RECIPE = """\
name: demo
model: {base: base}
data:
  texts: {path: rows.jsonl, format: text}
  talks: {path: rows.jsonl, format: alpaca}
stages:
  base: {kind: pretrain, data: texts}
  sft: {kind: sft, data: talks}
  last: {kind: compare, candidates: [sft], baseline: sft, prompts: talks}
"""


@pytest.mark.parametrize(
    ("old", "new", "told", "fix"),
    [
        ("path: rows.jsonl, format: text", "path: rows.jsonl, format: text, system: Be brief.",
         "4: data.texts.system: `system` has no effect: records of format text are no conversations",
         "remove it, or choose another format"),
        ("data: talks}", "data: talks, train: {lr_scheduler: constant, warmup_ratio: 0.1}}",
         "8: stages.sft.train.warmup_ratio: `warmup_ratio` has no effect: a constant learning rate has no warm-up",
         "remove it, or write lr_scheduler"),
        ("prompts: talks}", "prompts: talks, generation: {temperature: 0, top_p: 0.9}}",
         "9: stages.last.generation.top_p: `top_p` has no effect: greedy decoding draws nothing",
         "remove it, or write a temperature above 0"),
        ("sft, data: talks}", "sft, data: texts, loss_on: completion}",
         "8: stages.sft.loss_on: `loss_on` has no effect: plain text has no answers, all its tokens are trained",
         "remove it, or name data of another format"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_refused(refuse: Refuse, old: str, new: str, told: str, fix: str) -> None:
    assert old in RECIPE
    lines = refuse(RECIPE.replace(old, new, 1)).splitlines()
    assert lines[0].startswith(told)
    assert lines[1].startswith(f"  fix: {fix}")
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("format: text", "format: text, limit: 3"),
        ("data: talks}", "data: talks, train: {lr_scheduler: constant}}"),
        ("data: talks}", "data: talks, train: {lr_scheduler: constant, warmup_ratio: 0}}"),
        ("prompts: talks}", "prompts: talks, generation: {temperature: 0, max_new_tokens: 8, seed: 1}}"),
        ("prompts: talks}", "prompts: talks, generation: {temperature: 0, top_p: 1}}"),
        ("prompts: talks}", "prompts: talks, generation: {top_p: 0.9}}"),
        ("sft, data: talks}", "sft, data: texts}"),
        ("data: talks}", "data: talks, loss_on: all}"),
    ],
)
def test_its_neighbours_pass(check: Check, old: str, new: str) -> None:
    assert old in RECIPE
    check(RECIPE.replace(old, new, 1))


def test_an_override_is_told_as_such(check: Check, refuse: Refuse) -> None:
    check(RECIPE, "stages.last.generation={top_p: 0.9}")
    told = refuse(RECIPE, "stages.last.generation={top_p: 0.9}", "stages.last.generation.temperature=0")
    assert told.startswith("--set stages.last.generation={top_p: 0.9}: ")


class Inner(Settings):
    """Settings inside settings."""

    unread: ClassVar[tuple[Unread, ...]] = (Unread("depth", lambda inner: inner.flat, "flat is flat", "remove it"),)
    flat: bool = True
    depth: int = 1


class Sloped(TrainedStage):
    """What several methods share."""

    unread = (Unread("slope", lambda stage: stage.form == "step", "a step has no slope", "write form: ramp"),)
    form: Literal["step", "ramp"] = "step"
    slope: float = 1.0


class Foreign(Sloped):
    """A method of another package."""

    unread = (Unread("margin", lambda stage: True, "nothing reads it yet", "remove it"),)
    kind: Literal["foreign"] = "foreign"
    data: Annotated[str, DataRef(("conversation",))]
    margin: float = 0.0
    inner: Inner = Inner()
    parts: list[Inner] = []  # noqa: RUF012
    named: dict[str, Inner] = {}  # noqa: RUF012


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The method is registered, as an entry point would do it."""
    align.methods.all_methods()
    monkeypatch.setattr(align.methods, "_REGISTRY", dict(align.methods._REGISTRY))

    @method(Foreign, batch=Batch.TOKENS, needs={Needs.LOGPS}, reference=False, source="nowhere")
    def loss(logps: TokensLogps, config: Foreign) -> LossOutput:
        raise NotImplementedError

    for cached in (stage_kinds, recipe_model):
        cached.cache_clear()
    yield
    for cached in (stage_kinds, recipe_model):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("margin: 0.5", "margin: `margin` has no effect: nothing reads it yet"),
        ("slope: 2", "slope: `slope` has no effect: a step has no slope"),
        ("inner: {depth: 2}", "inner.depth: `depth` has no effect: flat is flat"),
        ("parts: [{flat: false, depth: 1}, {depth: 2}]", "parts.1.depth: `depth` has no effect"),
        ("named: {a: {depth: 2}}", "named.a.depth: `depth` has no effect"),
        ("train: {lr_scheduler: constant, warmup_ratio: 0.1}", "train.warmup_ratio: `warmup_ratio` has no effect"),
    ],
)
def test_a_class_of_another_package_declares_its_own(foreign: None, refuse: Refuse, settings: str, told: str) -> None:
    text = RECIPE.replace("  last:", f"  other: {{kind: foreign, data: talks, {settings}}}\n  last:")
    lines = refuse(text).splitlines()
    assert lines[0].startswith(f"9: stages.other.{told}")
    assert len(lines) == 2


def test_what_such_a_class_reads_passes(foreign: None, check: Check) -> None:
    settings = "form: ramp, slope: 2, inner: {flat: false, depth: 3}"
    check(RECIPE.replace("  last:", f"  other: {{kind: foreign, data: talks, {settings}}}\n  last:"))


def test_declarations_of_base_classes_hold() -> None:
    assert [each.field for each in declared(Foreign)] == ["margin", "slope"]

    class Hotter(TrainSettings):
        """Declares nothing itself."""

    assert [each.field for each in declared(Hotter)] == ["warmup_ratio"]


def test_a_declaration_about_no_field_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.unread names `depht`, which is no field of it"):

        class Wrong(Settings):
            unread = (Unread("depht", lambda settings: True, "", ""),)
            depth: int = 1
