"""Settings of `kind: sample`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from align.spec.base import DataRef, PolicyRef, Unread, cosmetic
from align.spec.data import Format
from align.spec.records import RecordsStage
from align.spec.stages import GenerationSettings
from align.spec.train import LaunchSettings


class SampleStage(RecordsStage):
    """Lets policies answer prompts: candidates, of which nothing is decided yet."""

    shows_names: ClassVar[bool] = True
    unread: ClassVar[tuple[Unread, ...]] = (
        Unread(
            "diversity_penalty",
            lambda stage: stage.decoding != "diverse_beam",
            "only groups of beams are kept apart",
            "remove it, or write `decoding: diverse_beam`",
        ),
        Unread(
            "engine",
            lambda stage: stage.decoding != "sample" and stage.engine != "local",
            "beams are searched by align itself",
            "remove it, or write `decoding: sample`",
        ),
    )

    kind: Literal["sample"] = "sample"
    policies: Annotated[list[PolicyRef], Field(min_length=1)]
    """Who answers: one or several stages that end with a policy. A candidate's source is the name of its stage."""
    prompts: Annotated[str, DataRef(("prompt", "conversation", "pair", "ranked", "samples", "unpaired"))]
    """What is asked; of records with answers, the prompts. Their rows' other columns go along, for verifiers."""
    completions: PositiveInt = 4
    """Answers of each policy to each prompt; with beams, how many are searched side by side and kept."""
    decoding: Literal["sample", "beam", "diverse_beam"] = "sample"
    """Draw every answer by itself, keep the likeliest beams, or beams that are kept apart (one beam to a group)."""
    diversity_penalty: NonNegativeFloat = 1.0
    """What a token costs a beam for each earlier beam that took it at the same place, in nats."""
    generation: GenerationSettings = GenerationSettings()
    engine: Literal["local", "transformers", "vllm"] = "local"
    """What draws them. Part of the fingerprint: another engine rounds otherwise or has draws of its own, and one token
    that differs changes all that follow."""
    include_responses: bool = False
    """Add the answers that the data itself has (`data.chosen`, `data.rejected`, `data.completion`, `data.0`) as
    candidates, in front of those that are drawn."""
    launch: LaunchSettings | None = cosmetic(None)
    """Overrides the recipe's `launch`; processes share the prompts, and the result is the same."""

    @property
    def makes(self) -> Format:
        return "samples"

    @model_validator(mode="after")
    def _differ(self) -> SampleStage:
        if self.decoding == "sample" and self.generation.temperature == 0 and self.completions > 1:
            raise ValueError(
                f"temperature 0 gives {self.completions} times the same answer: write `completions: 1`, "
                "a temperature above 0, or `decoding: beam`"
            )
        return self
