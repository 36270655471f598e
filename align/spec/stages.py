"""Base classes of stages, and the kinds that do not train."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from align.spec.base import (
    DataRef,
    HubAdapter,
    PolicyRef,
    Produces,
    Registered,
    Settings,
    StageRef,
    Unread,
    added,
    cosmetic,
)
from align.spec.model import ModelOverride
from align.spec.train import LaunchSettings, TrainSettings


class Stage(Settings):
    """One node of the graph."""

    version: ClassVar[int] = 1
    """Part of the fingerprint; raised when the kind's results change."""
    produces: ClassVar[Produces]
    shows_names: ClassVar[bool] = False
    """Whether its result holds the names of the stages it was made from, so that renaming one makes another result."""


class TrainedStage(Stage):
    """A stage that trains a policy."""

    produces: ClassVar[Produces] = "policy"
    train: TrainSettings = TrainSettings()
    launch: LaunchSettings | None = cosmetic(None)
    """Overrides the recipe's `launch`."""


class PolicyStage(TrainedStage):
    """A stage that trains an existing model: the recipe's base, a parent stage's policy, or somebody's adapter."""

    model: ModelOverride | None = None
    """Overrides fields of the recipe's `model`."""
    policy: PolicyRef | HubAdapter | None = None
    """Where the policy starts: a stage, an adapter made elsewhere, or (absent) the base with a fresh adapter."""


class TokensStage(PolicyStage):
    """A stage on sequences with a mask of trained tokens."""

    data: Annotated[str, DataRef(("conversation", "text"))]


class PairedStage(PolicyStage):
    """A stage on pairs of a chosen and a rejected completion."""

    data: Annotated[str, DataRef(("pair",))]


class UnpairedStage(PolicyStage):
    """A stage on single completions that are desirable or not."""

    data: Annotated[str, DataRef(("unpaired",))]


class RankedStage(PolicyStage):
    """A stage on ranked candidates; a pair is a list of two."""

    data: Annotated[str, DataRef(("ranked", "pair"))]


class Referenced(Settings):
    """Mixed into the stages of methods that take log-ratios against a frozen policy."""

    reference: PolicyRef
    """The frozen policy: a stage, declared and never guessed (adapters off is the base, not the SFT policy)."""


class Engined(Settings):
    """Mixed into the stages that TRL can train too."""

    engine: Literal["align", "trl"] = "align"
    """What trains the stage: align's own trainer, or TRL's, as a peer to check it against (needs the extra `trl`)."""


def engine_of(settings: Settings) -> str:
    """What trains the stage."""
    return settings.engine if isinstance(settings, Engined) else "align"


def reference_of(settings: Settings) -> str | None:
    """The stage whose policy is the reference; None for a method without one, and for `reference: null`."""
    return getattr(settings, "reference", None)


class GenerationSettings(Settings):
    """How completions are drawn."""

    unread: ClassVar[tuple[Unread, ...]] = (
        Unread(
            "top_p",
            lambda generation: generation.temperature == 0 and generation.top_p < 1,
            "greedy decoding draws nothing",
            "remove it, or write a temperature above 0",
        ),
        Unread(
            "top_k",
            lambda generation: generation.temperature == 0 and generation.top_k is not None,
            "greedy decoding draws nothing",
            "remove it, or write a temperature above 0",
        ),
    )

    max_new_tokens: PositiveInt = 128
    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the likeliest tokens that together have this probability, after `top_k`."""
    top_k: PositiveInt | None = added(None)
    """Draw from this many of the likeliest tokens."""
    stop: list[Annotated[str, Field(min_length=1)]] = added([])
    """Strings that end a completion; the text keeps them."""
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = cosmetic(64)
    """Completions that are drawn side by side; on a CPU the next multiple of 4."""


class CompareStage(Stage):
    """Judges several policies on the same held-out prompts, with bootstrap intervals."""

    kind: Literal["compare"] = "compare"
    produces = "comparison"
    shows_names = True
    candidates: Annotated[list[Annotated[str, StageRef("policy")]], Field(min_length=1)]
    baseline: PolicyRef
    """The candidate that win rates and KL are taken against."""
    prompts: Annotated[str, DataRef(("prompt", "conversation", "pair", "ranked", "samples", "unpaired"))]
    """Held-out prompts; of records with answers the prompts alone."""
    scorers: list[Annotated[str, Registered("align.scorers")]] = Field(default_factory=list)
    """Names of registered scorers (entry point group `align.scorers`); the first decides win rates."""
    generation: GenerationSettings = GenerationSettings()
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    resamples: PositiveInt = 2000
    """Bootstrap resamples over prompts."""
    show: PositiveInt = cosmetic(6)
    """Prompts shown with every candidate's answer."""
