"""What a recipe's parts say about each other: names that exist, ports that fit, settings that something reads."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator

from align.errors import RecipeError
from align.recipe.lineage import declared_model, model_loc, trains_base
from align.recipe.load import LoadedRecipe
from align.recipe.made import makers
from align.recipe.origins import Loc
from align.recipe.references import Reference, references
from align.recipe.shape import either
from align.recipe.sources import base_folder, plugins
from align.recipe.suggest import did_you_mean, nearest
from align.spec.base import DataRef, HubAdapter, StageRef
from align.spec.data import RECORDS_OF_CONVERSION, RECORDS_OF_FORMAT, DataSource, can_convert, records_of
from align.spec.model import LoraSettings, ModelSettings
from align.spec.online import RolloutStage
from align.spec.sample import SampleStage
from align.spec.score import ScoreStage
from align.spec.stages import CompareStage, PolicyStage

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
RESERVED = ("logs",)
"""Names that a run's folder uses itself."""


def check_names(loaded: LoadedRecipe) -> Iterator[RecipeError]:
    """Every mistake in the names of a recipe."""
    check = _Check(loaded)
    yield from check.own_names()
    yield from check.conversions()
    for name in loaded.stages:
        yield from check.references(name)
        yield from check.model(name)
    yield from check.unused()


class _Check:
    def __init__(self, loaded: LoadedRecipe) -> None:
        self.loaded, self.stages, self.data = loaded, loaded.stages, loaded.recipe.data
        self.bases = [name for name in self.stages if trains_base(loaded, name)]
        self.makers = makers(self.stages)
        self.meant: set[str] = set()
        """Data entries that some stage names, or seems to mean."""
        self.asked: set[str] = set()
        """Those of which some stage reads the prompts."""
        self.judged: set[str] = set()
        """Those of which some stage reads more."""

    def own_names(self) -> Iterator[RecipeError]:
        for part in ("stages", "data"):
            for name in getattr(self.loaded.recipe, part):
                if not NAME.fullmatch(name) or (part == "stages" and name in RESERVED):
                    why = "is used by the run's folder" if name in RESERVED else "has a character that is not allowed"
                    yield self._error((part, name), f"the name {name!r} {why}", "use letters, digits, _ and -")
        for name in self.makers.keys() & self.data.keys():
            yield self._error(
                ("stages", name),
                f"the stage `{name}` makes records, and an entry of `data` has the same name",
                "rename one of the two: a field that reads records could mean either",
            )
        if not self.stages:
            yield self._error(("stages",), "the recipe has no stages", "add at least one")

    def conversions(self) -> Iterator[RecipeError]:
        for name, source in self.data.items():
            if source.convert is not None and not can_convert(source):
                takes = RECORDS_OF_CONVERSION[source.convert][0]
                yield self._error(
                    ("data", name, "convert"),
                    f"`{source.convert}` takes {either(list(takes))} records; "
                    f"format {source.format} holds {RECORDS_OF_FORMAT[source.format]} records",
                    f"remove it, or choose a format that it takes: {', '.join(formats_of(takes))}",
                )

    def references(self, name: str) -> Iterator[RecipeError]:
        stage = self.stages[name]
        for reference in references(stage):
            loc = ("stages", name, *reference.loc)
            if isinstance(reference.mark, StageRef):
                yield from self._stage(name, loc, reference, reference.mark)
            elif isinstance(reference.mark, DataRef):
                yield from self._data(name, loc, reference, reference.mark)
        if isinstance(stage, CompareStage):
            yield from self._compare(name, stage)
            yield from self._twice(("stages", name, "candidates"), stage.candidates)
        if isinstance(stage, SampleStage):
            yield from self._twice(("stages", name, "policies"), stage.policies)
        if isinstance(stage, ScoreStage | RolloutStage):
            known = all(each in plugins("align.scorers") for each in stage.scorers)  # else that is what is told
            yield from self._weights(name, stage.weights, stage.parts) if known else ()

    def _stage(self, name: str, loc: Loc, reference: Reference, mark: StageRef) -> Iterator[RecipeError]:
        fitting = [each for each, stage in self.stages.items() if stage.produces == mark.produces and each != name]
        known = f"one of: {', '.join(fitting) or 'none'}"
        if reference.name == name:
            yield self._error(loc, f"stage `{name}` names itself", f"name another stage, {known}")
        elif reference.name not in self.stages:
            yield self._error(
                loc, f"there is no stage `{reference.name}`{did_you_mean(reference.name, fitting)}", known
            )
        elif self.stages[reference.name].produces != mark.produces:
            produces = self.stages[reference.name].produces
            yield self._error(loc, f"`{reference.name}` produces {_a(produces)}, not {_a(mark.produces)}", known)

    def _data(self, name: str, loc: Loc, reference: Reference, mark: DataRef) -> Iterator[RecipeError]:
        makers = {each: RECORDS_OF_FORMAT[stage.makes] for each, stage in self.makers.items() if each != name}
        entries = [each for each, source in self.data.items() if _serves(source, mark)]
        fitting = [*entries, *(each for each, held in makers.items() if held in mark.records)]
        self.meant.add(reference.name)
        (self.asked if "prompt" in mark.records else self.judged).add(reference.name)
        if reference.name == name:
            known = f"one of: {', '.join(fitting) or 'none'}"
            yield self._error(loc, f"stage `{name}` names itself", f"name other records, {known}")
        elif reference.name in makers:
            yield from self._made(name, loc, reference.name, makers[reference.name], mark, fitting)
        elif reference.name in self.data:
            yield from self._entry(name, loc, reference.name, mark, entries)
        elif reference.name in self.stages:
            produces = _a(self.stages[reference.name].produces)
            known = f"one of: {', '.join(fitting) or 'none'}"
            yield self._error(loc, f"stage `{reference.name}` produces {produces}, and no records", known)
        else:
            near = nearest(reference.name, fitting) or nearest(reference.name, [*self.data, *makers])
            self.meant.update(near)
            stage = " and no stage that makes records" if makers else ""
            yield self._error(
                loc,
                f"there is no data entry{stage} `{reference.name}`{did_you_mean(reference.name, near)}",
                f"one of: {', '.join(fitting) or 'none'}; or add it under `data`",
            )

    def _made(
        self, name: str, loc: Loc, named: str, held: str, mark: DataRef, fitting: list[str]
    ) -> Iterator[RecipeError]:
        """Records that a stage makes must be of a kind that is read there."""
        if held not in mark.records:
            yield self._error(
                loc,
                f"`{named}` makes {held} records; {self._kind(name)} reads {either(list(mark.records))} records",
                f"{_way(named, held, mark)}; others that serve: {', '.join(fitting) or 'none'}",
            )

    def _entry(self, name: str, loc: Loc, named: str, mark: DataRef, fitting: list[str]) -> Iterator[RecipeError]:
        """Records of an entry, too."""
        source = self.data[named]
        held = _held(source, mark)
        if source.format in mark.without and held in mark.records:
            yield self._error(
                loc,
                f"`{named}` has the format {source.format}, which {self._kind(name)} does not read",
                f"formats that serve: {', '.join(formats_of(mark.records, mark.without))}",
            )
        elif held not in mark.records and can_convert(source):
            self.meant.update(fitting)
            entries = f"; entries that do: {', '.join(fitting)}" if fitting else ""
            converted = f" and convert: {source.convert}" if source.convert else ""
            formats = ", ".join(formats_of(mark.records, mark.without))
            yield self._error(
                loc,
                f"`{named}` has the format {source.format}{converted}, which holds {held} "
                f"records; {self._kind(name)} reads {either(list(mark.records))} records",
                f"formats that serve: {formats}{entries}{_conversions(source, mark)}",
            )

    def _kind(self, name: str) -> str:
        return str(type(self.stages[name]).model_fields["kind"].default)

    def _compare(self, name: str, stage: CompareStage) -> Iterator[RecipeError]:
        if stage.baseline not in stage.candidates and stage.baseline in self.stages:
            yield self._error(
                ("stages", name, "baseline"),
                f"the baseline `{stage.baseline}` is not among the candidates",
                f"add it to `candidates`, or name one of {', '.join(stage.candidates)}",
            )

    def _weights(self, name: str, weights: Iterable[str], parts: list[str]) -> Iterator[RecipeError]:
        for each in weights:
            if each not in parts:
                yield self._error(
                    ("stages", name, "weights", each),
                    f"no score of stage `{name}` is called `{each}`{did_you_mean(each, parts)}",
                    f"one of: {', '.join(parts)}",
                )

    def _twice(self, loc: Loc, names: list[str]) -> Iterator[RecipeError]:
        for i, each in enumerate(names):
            if each in names[:i]:
                yield self._error((*loc, i), f"`{each}` is named twice", "name it once")

    def model(self, name: str) -> Iterator[RecipeError]:
        stage = self.stages[name]
        if not isinstance(stage, PolicyStage):
            return
        model = declared_model(self.loaded, name, stage)
        if model is None:
            base = self.bases[0] if self.bases else "Qwen/Qwen3-0.6B"
            yield self._error(
                ("stages", name),
                f"stage `{name}` trains a model, and the recipe names none",
                f"add `model: {{base: {base}}}` at the top of the recipe",
            )
            return
        yield from self._base(name, model.base)
        if model.revision is not None and (model.base in self.stages or base_folder(model.base, self.loaded.folder)):
            yield self._error(
                model_loc(self.loaded, name, "revision"),
                f"`revision` is ignored: `{model.base}` is not on the Hub",
                "remove it",
            )
        if isinstance(stage.policy, HubAdapter):
            yield from self._adapter(name, stage.policy, model)

    def _adapter(self, name: str, policy: HubAdapter, model: ModelSettings) -> Iterator[RecipeError]:
        """A local adapter must be there and be what `model.adapter` says; one on the Hub is read by the worker."""
        loc, adapter = ("stages", name, "policy", "adapter"), policy.adapter
        folder = base_folder(adapter, self.loaded.folder)
        if folder is None:
            if looks_like_path(adapter):
                yield self._error(loc, f"there is no folder {adapter}", f"paths start at {self.loaded.path.parent}/")
            return
        if policy.revision is not None:
            yield self._error(
                (*loc[:-1], "revision"), f"`revision` is ignored: `{adapter}` is not on the Hub", "remove it"
            )
        try:
            found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            yield self._error(
                loc, f"{adapter} holds no readable adapter_config.json: {error}", "name the folder of a PEFT adapter"
            )
            return
        if isinstance(model.adapter, LoraSettings) and not model.merge_parent:
            for mine, theirs in (("rank", "r"), ("alpha", "lora_alpha"), ("rslora", "use_rslora")):
                value = getattr(model.adapter, mine)
                if theirs in found and found[theirs] != value:
                    yield self._error(
                        model_loc(self.loaded, name, "adapter", mine),
                        f"{mine} is {value}, the adapter {adapter} has {found[theirs]}",
                        f"write {mine}: {found[theirs]}, or set merge_parent: true in the stage's `model`",
                    )

    def _base(self, name: str, base: str) -> Iterator[RecipeError]:
        loc = model_loc(self.loaded, name, "base")
        others = [each for each in self.bases if each != name]
        if base == name and name in self.bases:
            yield self._error(
                loc, f"stage `{name}` cannot be its own base", f"give stage `{name}` a `model.base` of its own"
            )
        elif base in self.stages and base not in self.bases:
            adapter, reward = (self.stages[base].produces == each for each in ("policy", "reward"))
            why = "trains an adapter" if adapter else "trains a reward model" if reward else "trains nothing"
            known = ", ".join(others) or "a Hub model"
            fix = f"write `policy: {base}` in the stages that go on from it" if adapter else f"one of: {known}"
            yield self._error(loc, f"`{base}` {why}, it is no base", fix)
        elif base in self.stages:
            return
        elif base_folder(base, self.loaded.folder) is None:
            if looks_like_path(base):
                yield self._error(loc, f"there is no folder {base}", f"paths start at {self.loaded.path.parent}/")
            elif "/" not in base and nearest(base, others):
                yield self._error(
                    loc, f"`{base}` is no stage and no folder{did_you_mean(base, others)}", "name one, or a Hub model"
                )

    def unused(self) -> Iterator[RecipeError]:
        for name in self.data:
            if name not in self.meant:
                yield self._error(("data", name), f"no stage reads `{name}`", "remove it, or name it in a stage")
            elif self.data[name].convert and name in self.asked - self.judged:
                yield self._error(
                    ("data", name, "convert"), "`convert` has no effect: only prompts are read of it", "remove it"
                )
        if self.loaded.recipe.model is not None and not any(
            isinstance(each, PolicyStage) for each in self.stages.values()
        ):
            yield self._error(("model",), "no stage reads `model`", "remove it")

    def _error(self, loc: Loc, message: str, fix: str) -> RecipeError:
        return RecipeError(message, where=self.loaded.where(*loc), fix=fix)


def formats_of(records: Collection[str], without: Collection[str] = ()) -> list[str]:
    """The formats that hold one of these kinds of records, some left out."""
    return [fmt for fmt, record in RECORDS_OF_FORMAT.items() if record in records and fmt not in without]


def _held(source: DataSource, mark: DataRef) -> str:
    """What a stage finds in an entry: its records, converted unless only their prompts are read."""
    return RECORDS_OF_FORMAT[source.format] if "prompt" in mark.records else records_of(source)


def _way(named: str, held: str, mark: DataRef) -> str:
    """How records that a stage makes could be made to serve."""
    score = f"{{kind: score, samples: {named}, ...}}"
    if "ranked" in mark.records and held == "samples":
        return f"add a stage in between: {score}"
    if held in ("samples", "ranked") and {"pair", "conversation"} & set(mark.records):
        scored = "SCORED" if held == "samples" else named
        select = f"{{kind: select, candidates: {scored}, how: ...}}"
        return f"add a stage in between: {select}" if held == "ranked" else f"add two in between: {score}, {select}"
    return f"name records of another kind, or change what `{named}` makes"


def _serves(source: DataSource, mark: DataRef) -> bool:
    """Whether an entry can be named there."""
    return _held(source, mark) in mark.records and source.format not in mark.without


def _conversions(source: DataSource, mark: DataRef) -> str:
    """How the records of an entry could be made to serve."""
    held = RECORDS_OF_FORMAT[source.format]
    ways = [how for how, (takes, gives) in RECORDS_OF_CONVERSION.items() if held in takes and gives in mark.records]
    return f"; or write `convert: {' | '.join(ways)}` in `{source.format}` data" if ways else ""


def _a(produces: str) -> str:
    return {"reward": "a reward model", "records": "records"}.get(produces, f"a {produces}")


def looks_like_path(name: str) -> bool:
    """Whether a name can be a folder's only: the Hub knows `model` and `owner/model`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
