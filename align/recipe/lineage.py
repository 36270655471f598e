"""Which base every policy stands on: the model of each stage, resolved from the recipe's, its overrides and its parent.

A trained stage yields (base, adapter or none). An adapter goes on from its parent's; a parent trained in full is its
child's base; `merge_parent` makes a new base of parent and adapter. All roles of a stage stand on one base.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from align.errors import RecipeError
from align.recipe.load import LoadedRecipe
from align.recipe.origins import Loc
from align.recipe.references import references
from align.spec.base import HubAdapter, StageRef
from align.spec.model import LoraSettings, ModelSettings
from align.spec.stages import PolicyStage, TrainedStage

SAME_IN_ADAPTERS = ("rank", "alpha", "targets", "rslora")
"""What must agree for a copy of an adapter to compute the same. Dropout may differ."""


@dataclass(frozen=True)
class Policy:
    """The model that a stage ends with: a policy, or a reward model, whose head no other stage asks for.

    Attributes:
        base: The base: a stage of the recipe, a folder, a Hub name, or ``parent+child`` for a merged one.
        model: The settings it was trained with.
        adapter: The adapter on the base, or None for a base of its own.
        ancestors: Every base on the way here; `model.base` may name any of them.
    """

    base: str
    model: ModelSettings
    adapter: LoraSettings | None
    ancestors: frozenset[str] = frozenset()


@dataclass
class Lineage:
    """Resolves stages in topological order.

    Attributes:
        loaded: The recipe.
        policies: The policies of the stages resolved so far.
        errors: What is wrong.
    """

    loaded: LoadedRecipe
    policies: dict[str, Policy] = field(default_factory=dict)
    errors: list[RecipeError] = field(default_factory=list)

    def resolve(self, name: str) -> ModelSettings | None:
        """The model of a stage; None for a kind that loads none, or where an error stands in the way."""
        stage = self.loaded.stages[name]
        if not isinstance(stage, TrainedStage):
            return None
        if not isinstance(stage, PolicyStage):
            model = ModelSettings(base=name, adapter="none")
            self.policies[name] = Policy(name, model, None, frozenset({name}))
            return None
        declared = declared_model(self.loaded, name, stage)
        if declared is None:
            return None
        before = len(self.errors)
        policy = self._policy(name, stage, declared)
        if policy is None or len(self.errors) > before:
            return None
        self._one_base(name, stage, policy)
        full = Policy(name, policy.model, None, policy.ancestors | {name})
        self.policies[name] = full if policy.adapter is None else policy
        return policy.model

    def _policy(self, name: str, stage: PolicyStage, model: ModelSettings) -> Policy | None:
        adapter = model.adapter if isinstance(model.adapter, LoraSettings) else None
        if model.merge_parent and stage.policy is None:
            self._error(
                self._model_loc(name, "merge_parent"),
                f"stage `{name}` has no parent to merge",
                "remove merge_parent, or name the parent: `policy: <stage>`",
            )
            return None
        if isinstance(stage.policy, str):
            parent = self.policies.get(stage.policy)
            return None if parent is None else self._child(name, stage.policy, parent, model, adapter)
        if isinstance(stage.policy, HubAdapter) and adapter is None and not model.merge_parent:
            self._error(
                ("stages", name, "policy"),
                "the policy is an adapter, but the stage trains every parameter (adapter: none)",
                "set merge_parent: true in the stage's `model`, or give the adapter's settings",
            )
            return None
        ancestors = self._bases_below(model.base)
        base = f"{model.base}+{name}" if model.merge_parent else model.base
        return Policy(base, model, adapter, ancestors | {base})

    def _child(
        self, name: str, parent_name: str, parent: Policy, model: ModelSettings, adapter: LoraSettings | None
    ) -> Policy | None:
        self._agree_on_base(name, parent_name, parent, model)
        if parent.adapter is None:
            if model.merge_parent:
                self._error(
                    self._model_loc(name, "merge_parent"),
                    f"`{parent_name}` was trained in full: it has no adapter to merge",
                    "remove merge_parent",
                )
            model = model.model_copy(update={"base": parent_name, "revision": None})
            return Policy(parent_name, model, adapter, parent.ancestors)
        model = model.model_copy(update={"base": parent.model.base, "revision": parent.model.revision})
        if model.merge_parent:
            base = f"{parent_name}+{name}"
            return Policy(base, model, adapter, parent.ancestors | {base})
        self._same_adapter(name, parent_name, parent, model, adapter)
        return Policy(parent.base, model, adapter, parent.ancestors)

    def _agree_on_base(self, name: str, parent_name: str, parent: Policy, model: ModelSettings) -> None:
        own = getattr(self.loaded.stages[name], "model", None)
        explicit = own is not None and own.base is not None
        base = parent_name if parent.adapter is None else parent.model.base
        if model.base not in ({base} if explicit else parent.ancestors | {base}):
            stands = "is a base of its own" if parent.adapter is None else f"stands on `{base}`"
            self._error(
                self._model_loc(name, "base"),
                f"`{name}` goes on from `{parent_name}`, which {stands}: its base cannot be `{model.base}`",
                f"write `model: {{base: {base}}}` in stage `{name}`, or another `policy`",
            )

    def _same_adapter(
        self, name: str, parent_name: str, parent: Policy, model: ModelSettings, adapter: LoraSettings | None
    ) -> None:
        mine: dict[str, Any] = {"quantization": model.quantization}
        theirs: dict[str, Any] = {"quantization": parent.model.quantization}
        if adapter is None:
            mine["adapter"], theirs["adapter"] = "none", "lora"
        else:
            assert parent.adapter is not None
            mine |= {each: _plain(getattr(adapter, each)) for each in SAME_IN_ADAPTERS}
            theirs |= {each: _plain(getattr(parent.adapter, each)) for each in SAME_IN_ADAPTERS}
        for each in [each for each in mine if mine[each] != theirs[each]]:
            inside = each not in ("quantization", "adapter")
            same = f"use {each} {theirs[each]} here too" if each != "adapter" else "remove `adapter: none`"
            self._error(
                self._model_loc(name, *(("adapter", each) if inside else (each,))),
                f"`{name}` has {each} {mine[each]}, its parent `{parent_name}` has {theirs[each]}: "
                "an adapter goes on as a copy of its parent's",
                f"{same}, or set merge_parent: true in the stage's `model`",
            )

    def _one_base(self, name: str, stage: PolicyStage, policy: Policy) -> None:
        """Every other policy that the stage names must stand on the base that the stage loads."""
        for reference in references(stage):
            if (
                not isinstance(reference.mark, StageRef)
                or reference.loc == ("policy",)
                or reference.mark.produces != "policy"
            ):
                continue
            other = self.policies.get(reference.name)
            if other is None:
                continue
            fits, why = _fits(policy, other, same=reference.name == stage.policy)
            if not fits:
                self._error(
                    ("stages", name, *reference.loc),
                    f"{reference.loc[0]} `{reference.name}` {why}",
                    f"name a {reference.loc[0]} that suits `{policy.base}`, or change the stage's `policy` or `model`",
                )

    def _bases_below(self, base: str) -> frozenset[str]:
        return self.policies[base].ancestors if base in self.policies else frozenset({base})

    def _model_loc(self, name: str, *field: str) -> Loc:
        return model_loc(self.loaded, name, *field)

    def _error(self, loc: Loc, message: str, fix: str) -> None:
        self.errors.append(RecipeError(message, where=self.loaded.where(*loc), fix=fix))


def declared_model(loaded: LoadedRecipe, name: str, stage: PolicyStage) -> ModelSettings | None:
    """The recipe's model with the stage's overrides, inside the adapter too; None if neither names a base."""
    own: dict[str, Any] = {}
    if stage.model is not None:
        own = {key: value for key in stage.model.model_fields_set if (value := getattr(stage.model, key)) is not None}
    if loaded.recipe.model is not None:
        general = loaded.recipe.model
        # Another base has revisions of its own.
        stale = {"revision": None} if "base" in own else {}
        if isinstance(own.get("adapter"), LoraSettings) and isinstance(general.adapter, LoraSettings):
            adapter = own["adapter"]
            given = {key: getattr(adapter, key) for key in adapter.model_fields_set}
            own["adapter"] = general.adapter.model_copy(update=given)
        return general.model_copy(update=stale | own)
    return ModelSettings(**own) if "base" in own else None


def trains_base(loaded: LoadedRecipe, name: str) -> bool:
    """Whether a stage ends with a language model of its own, which others can take for their base."""
    stage = loaded.stages[name]
    if stage.produces != "policy":
        return False
    if not isinstance(stage, PolicyStage):
        return isinstance(stage, TrainedStage)
    model = declared_model(loaded, name, stage)
    return model is not None and model.adapter == "none"


def model_loc(loaded: LoadedRecipe, name: str, *field: str) -> Loc:
    """Where a field of a stage's model was decided: in the stage, else in the recipe's `model`, else at its policy."""
    for loc in (("stages", name, "model", *field), ("model", *field)):
        if loaded.origins.knows(loc):
            return loc
    for loc in (("stages", name, "policy"), ("stages", name)):
        if loaded.origins.knows(loc):
            return loc
    return ("stages", name)


def _fits(policy: Policy, other: Policy, same: bool) -> tuple[bool, str]:
    """Whether another policy can stand beside a stage's own, and why not."""
    if policy.model.merge_parent:
        return same, "is not the parent that is merged into the new base"
    if policy.adapter is None:
        return other.adapter is None, "is an adapter, but the stage trains every parameter: the base moves under it"
    if other.base != policy.base:
        return (
            False,
            f"stands on the base `{other.base}`, the stage's policy on `{policy.base}`: a process loads one base",
        )
    agree = other.adapter is None or other.model.quantization == policy.model.quantization
    return (
        agree,
        f"was trained on the base in {other.model.quantization}, the stage loads it in {policy.model.quantization}",
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
