"""What a recipe would do: which stages run, in how many steps, in how much memory and disk.

Read from settings, file sizes and headers only: no tokenizer, no model, nothing downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from align.methods import get_method
from align.methods.pretrain import Pretrain
from align.recipe import machine
from align.recipe.digest import Digests
from align.recipe.graph import Graph, Node
from align.recipe.memory import ADAM_BYTES, MASTER_BYTES, Parts, generation_memory, training_memory
from align.recipe.packing import TRL, PackingChoice, choose, kernel_for
from align.recipe.reference import ReferenceNode, reference_nodes
from align.recipe.rows import count_rows
from align.recipe.seats import (
    UPDATING,
    at_its_peak,
    drawing_memory,
    entropy_of,
    frozen_adapters,
    has_critic,
    largest_example,
    seats,
    shares_base,
)
from align.recipe.sizes import ModelSize, cached_folder, config_of_folder, size_of_architecture, size_of_folder
from align.recipe.sources import base_folder
from align.recipe.uses import models_used, records_note
from align.spec.data import records_of
from align.spec.model import LoraSettings, ModelSettings
from align.spec.online import RolloutStage
from align.spec.records import RecordsStage
from align.spec.sample import SampleStage
from align.spec.stages import CompareStage, Stage, TrainedStage, engine_of, reference_of
from align.types import Batch

GIB = 2**30

LLAMA = {"model_type": "llama"}
"""What `pretrain` makes."""

COMPLETIONS = {Batch.TOKENS: 1, Batch.PAIRED: 2, Batch.UNPAIRED: 1, Batch.RANKED: 4}
"""Completions of an example, to estimate its size by; how long ranked lists are is known once they are read."""


@dataclass(frozen=True)
class PlanRow:
    """One stage.

    Attributes:
        stage: Its name.
        kind: Its kind.
        state: Whether it is taken from the store, goes on from a checkpoint, or starts.
        fingerprint: Under which its artifact is kept.
        trains: Whether it takes optimizer steps.
        steps: How many; None where only reading the data tells.
        at_most: Whether rows that are dropped would make fewer steps.
        known_after: The stage that has yet to make the records, where that is why nobody knows the steps.
        resume_step: Step of the checkpoint it goes on from.
        memory: Bytes of one rank by what they are for; empty where the model's size is not known.
        disk: Bytes of its artifact.
        scratch: Bytes of checkpoints while it runs.
        packing: How its sequences are laid out and what computes attention, as far as its model's configuration tells;
            None for a stage that does not train, and where the configuration is not on this machine.
        notes: What a user should know.
    """

    stage: str
    kind: str
    state: Literal["reuse", "resume", "run"]
    fingerprint: str
    trains: bool = False
    steps: int | None = None
    at_most: bool = False
    known_after: str | None = None
    resume_step: int = 0
    memory: Parts = field(default_factory=dict)
    disk: int | None = None
    scratch: int = 0
    packing: PackingChoice | None = None
    notes: tuple[str, ...] = ()

    @property
    def total_memory(self) -> int | None:
        """Bytes of one rank."""
        return sum(self.memory.values()) or None


@dataclass(frozen=True)
class Plan:
    """The stages of a recipe in the order they run, and the reference log-probabilities that they share."""

    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...] = ()
    references: tuple[ReferenceNode, ...] = ()

    @property
    def disk_needed(self) -> int:
        """Bytes that running it takes at its fullest: new artifacts, and the largest set of checkpoints."""
        todo = [row for row in self.rows if row.state != "reuse"]
        return sum(row.disk or 0 for row in todo) + max((row.scratch for row in todo), default=0)


def make_plan(
    graph: Graph,
    store_find: Callable[[str], bool],
    resumes_at: Callable[[str], int | None] = lambda fingerprint: None,
    *,
    kept_references: Callable[[str], Mapping[str, int]] = lambda fingerprint: {},
    digests: Digests | None = None,
    compute_bytes: int | None = None,
    device: Literal["cpu", "cuda"] | None = None,
) -> Plan:
    """Plan every stage of a graph.

    Args:
        graph: The recipe.
        store_find: Whether the store has the artifact of a fingerprint.
        resumes_at: Step of the newest checkpoint of a fingerprint; None if there is none.
        kept_references: What the store has of a policy's log-probabilities: `rows_id` -> number of rows.
        digests: Of data files.
        compute_bytes: Bytes of a number where `dtype` is auto; this machine's choice if absent.
        device: Where stages run; what this machine has if absent.
    """
    planner = _Planner(graph, compute_bytes or _auto_bytes(), device or machine.device())
    rows = []
    for node in graph.nodes.values():
        step = resumes_at(node.fingerprint)
        state: Literal["reuse", "resume", "run"] = "resume" if step is not None else "run"
        rows.append(planner.row(node, "reuse" if store_find(node.fingerprint) else state, step or 0))
    finished = {row.stage: row.state == "reuse" for row in rows}
    policies = {name for node in graph.nodes.values() if (name := reference_of(node.stage)) is not None}
    kept = {name: kept_references(graph.nodes[name].fingerprint) for name in policies}
    shared = reference_nodes(graph, finished, kept, digests or Digests(graph.loaded.folder))
    notes = tuple(f"{name}: {why}" for name, why in graph.unresolved.items())
    return Plan(tuple(rows), notes, tuple(shared))


def _auto_bytes() -> int:
    return 2 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 4


class _Planner:
    """Sizes and estimates of the stages of one graph."""

    def __init__(self, graph: Graph, auto_bytes: int, device: Literal["cpu", "cuda"]) -> None:
        self.graph, self.auto_bytes, self.device = graph, auto_bytes, device
        self.sizes: dict[str, ModelSize | None] = {}
        self.unmade = set[str]()
        """Stages so far whose records are not there yet."""

    def row(self, node: Node, state: Literal["reuse", "resume", "run"], step: int) -> PlanRow:
        kind = str(type(node.stage).model_fields["kind"].default)
        if state == "reuse":
            return PlanRow(node.name, kind, state, node.fingerprint)
        if isinstance(node.stage, RecordsStage):
            self.unmade.add(node.name)
        if isinstance(node.stage, RecordsStage | CompareStage):
            memory, notes = self.using(node.stage), self.notes(node)
            return PlanRow(node.name, kind, state, node.fingerprint, resume_step=step, memory=memory, notes=notes)
        assert isinstance(node.stage, TrainedStage)
        disk, scratch = self.disk(node, node.stage)
        return PlanRow(
            node.name,
            kind,
            state,
            node.fingerprint,
            trains=True,
            steps=self.steps(node, node.stage),
            at_most=node.stage.train.max_steps is None,
            known_after=next((each for each in node.data if each in self.unmade), None),
            resume_step=step,
            memory=self.training(node, node.stage),
            disk=disk,
            scratch=scratch,
            packing=self.packing(node, node.stage),
            notes=self.notes(node),
        )

    # Sizes -----------------------------------------------------------------------------------------------------------

    def size(self, node: Node) -> ModelSize | None:
        """The size of the model that a stage trains; None where it is not on this machine."""
        if isinstance(node.stage, Pretrain):
            return size_of_architecture(node.stage.architecture, node.stage.tokenizer.vocab_size)
        return self.size_of_base(node.model) if node.model is not None else None

    def size_of_base(self, model: ModelSettings) -> ModelSize | None:
        if model.base in self.graph.nodes:
            return self.size(self.graph.nodes[model.base])
        if model.base not in self.sizes:
            folder = self.folder(model)
            self.sizes[model.base] = None if folder is None else size_of_folder(folder)
        return self.sizes[model.base]

    def folder(self, model: ModelSettings) -> Path | None:
        """Where a base that no stage makes is on this machine."""
        return base_folder(model.base, self.graph.loaded.folder) or cached_folder(model)

    def config(self, node: Node) -> dict[str, Any]:
        """The configuration of the model that a stage trains; empty where it is not on this machine."""
        if isinstance(node.stage, Pretrain):
            return LLAMA
        if node.model is None:
            return {}
        if node.model.base in self.graph.nodes:
            return self.config(self.graph.nodes[node.model.base])
        folder = self.folder(node.model)
        return {} if folder is None else config_of_folder(folder)

    def bytes_of(self, model: ModelSettings) -> int:
        return {"float32": 4, "bfloat16": 2}.get(model.dtype, self.auto_bytes)

    def model(self, node: Node) -> ModelSettings:
        """The settings of a trained stage's model; a pretrained one has those of a model trained in full."""
        return node.model or ModelSettings(base=node.name, adapter="none")

    # Estimates -------------------------------------------------------------------------------------------------------

    def steps(self, node: Node, stage: TrainedStage) -> int | None:
        """Optimizer steps, if no row is dropped."""
        train = stage.train
        if train.max_steps is not None:
            return train.max_steps
        if isinstance(stage, RolloutStage):
            prompts = count_rows(node.data[stage.prompts], self.graph.loaded.folder)
            return None if prompts is None else stage.total_steps(prompts)
        rows = [count_rows(source, self.graph.loaded.folder) for source in node.data.values()]
        if None in rows:
            return None
        examples = sum(each for each in rows if each is not None)
        if train.validation is not None:
            examples -= int(examples * train.validation.fraction)
        return math.ceil((train.epochs or 1.0) * math.ceil(examples / train.global_batch_size))

    def training(self, node: Node, stage: TrainedStage) -> Parts:
        size = self.size(node)
        if size is None:
            return {}
        parts = self.update(node, stage, size)
        if isinstance(stage, RolloutStage):
            parts = at_its_peak(parts, drawing_memory(node, size, self.bytes_of(self.model(node))))
        own = self.own_reward(node)
        return parts | {"the reward model's own base": own} if own else parts

    def update(self, node: Node, stage: TrainedStage, size: ModelSize) -> Parts:
        """An optimizer step of a stage."""
        model, train = self.model(node), stage.train
        completions = COMPLETIONS.get(get_method(stage.kind).batch, 1)  # type: ignore[attr-defined]
        if all(records_of(source) == "pair" for source in node.data.values()):
            completions = COMPLETIONS[Batch.PAIRED]  # a list of two, for a method on lists
        example = completions * train.max_tokens
        if isinstance(stage, RolloutStage):
            packing = self.packing(node, stage)
            example = largest_example(stage, shared=packing is not None and packing.packing == "shared")
        share = math.ceil(train.global_batch_size / node.launch.processes) * example
        critic = isinstance(stage, RolloutStage) and has_critic(stage)
        at_once = critic and example <= train.pack_tokens // 2  # see `align/training/rollout_step.py`
        budget = train.pack_tokens // 2 if at_once else train.pack_tokens
        return training_memory(
            size,
            model,
            node.launch,
            pack_tokens=min(max(budget, example), share),
            compute_bytes=self.bytes_of(model),
            frozen_adapters=frozen_adapters(node, self.graph),
            critic=critic,
            at_once=at_once,
            scores=stage.produces == "reward",
            entropy=entropy_of(stage) if isinstance(stage, RolloutStage) else "none",
            device=self.device,
        )

    def own_reward(self, node: Node) -> int:
        """Bytes of a reward model that does not share the base of the stage that asks it."""
        if not isinstance(node.stage, RolloutStage) or node.stage.reward is None or shares_base(node, self.graph):
            return 0
        reward = self.graph.nodes[node.stage.reward]
        size, model = self.size(reward), self.model(reward)
        if size is None:
            return 0
        lora = model.adapter if isinstance(model.adapter, LoraSettings) else None
        base = size.frozen_bytes(model.quantization if lora else "none", self.bytes_of(model))
        return base + (MASTER_BYTES * size.adapter_parameters(lora) if lora else 0)

    def packing(self, node: Node, stage: TrainedStage) -> PackingChoice | None:
        """What the engine will choose, unless the model itself disagrees with its configuration."""
        model, config = self.model(node), self.config(node)
        if engine_of(stage) == "trl":
            return TRL
        if not config:
            return None
        dropout = isinstance(model.adapter, LoraSettings) and model.adapter.dropout > 0
        kernel = kernel_for(self.device, half=self.bytes_of(model) == 2)
        choice = choose(config, dropout=dropout, wanted=stage.train.packing, kernel=kernel)
        return choice.of_batch(get_method(stage.kind).batch)  # type: ignore[attr-defined]

    def using(self, stage: Stage) -> Parts:
        """Every distinct base once, every adapter, and what generation takes on the largest."""
        bases: dict[str, int] = {}
        adapters, generation = 0, Parts()
        for name in models_used(stage):
            node = self.graph.nodes[name]
            size, model = self.size(node), self.model(node)
            if size is None:
                return {}
            lora = model.adapter if isinstance(model.adapter, LoraSettings) else None
            base = model.base if lora else name
            bases[f"{base} {model.quantization} {model.dtype}"] = size.frozen_bytes(
                model.quantization if lora else "none", self.bytes_of(model)
            )
            adapters += 4 * size.adapter_parameters(lora) if lora else 0
            if isinstance(stage, SampleStage | CompareStage):
                own = generation_memory(size, stage.generation, self.bytes_of(model))
                generation = max(generation, own, key=lambda parts: sum(parts.values()))
        return {"base": sum(bases.values()), "frozen adapters": adapters, **generation}

    def disk(self, node: Node, stage: TrainedStage) -> tuple[int | None, int]:
        """Bytes of the artifact, and of the checkpoints beside it while it is made."""
        size, model, train = self.size(node), self.model(node), stage.train
        if size is None:
            return None, 0
        lora = model.adapter if isinstance(model.adapter, LoraSettings) else None
        trained = size.adapter_parameters(lora) if lora else size.parameters
        trained += size.hidden if stage.produces == "reward" else 0
        deepspeed = node.launch.deepspeed != "none"
        weights = trained * (self.bytes_of(model) if deepspeed else MASTER_BYTES)
        merged = size.parameters * self.bytes_of(model) if model.merge_parent else 0
        checkpoint = weights + trained * (ADAM_BYTES + (2 * MASTER_BYTES if deepspeed else 0))
        keeps_best = train.validation is not None and train.validation.keep == "best"
        best = (train.keep_checkpoints + 2) * weights if keeps_best else 0  # those that checkpoints name, and the next
        # One more than is kept: the next is whole before the oldest goes. A merged base is made in the work folder.
        kept = train.keep_checkpoints + 1 if engine_of(stage) == "align" else 0
        return weights + merged, kept * checkpoint + best + merged

    # Notes -----------------------------------------------------------------------------------------------------------

    def notes(self, node: Node) -> tuple[str, ...]:
        return tuple(
            note
            for note in (
                self.peer(node),
                self.second_copy(node),
                self.seats(node),
                self.merging(node),
                self.positions(node),
                records_note(node, self.graph.loaded.folder),
                self.unknown(node),
            )
            if note
        )

    def peer(self, node: Node) -> str:
        """What is different where TRL trains."""
        if engine_of(node.stage) == "align":
            return ""
        note = "trained by TRL: no checkpoints are kept, so if it is stopped it starts again"
        full = node.model is not None and node.model.adapter == "none"
        return note + ("; the reference is a second copy" if full and reference_of(node.stage) else "")

    def second_copy(self, node: Node) -> str:
        """Full fine-tuning moves the base, so a reference that is another stage needs a base of its own."""
        stage, model, reference = node.stage, node.model, reference_of(node.stage)
        if reference is None or model is None or model.adapter != "none":
            return ""
        policy = getattr(stage, "policy", None)
        start = policy if isinstance(policy, str) else model.base
        if start == reference or self.graph.nodes[reference].fingerprint == self._fingerprint(start):
            return ""
        size = self.size_of_base(model)
        much = f" ({size_text(size.parameters * self.bytes_of(model))})" if size else ""
        return f"second copy: the reference {reference} is no adapter of this base{much}; read once, then freed"

    def _fingerprint(self, stage: str) -> str | None:
        return self.graph.nodes[stage].fingerprint if stage in self.graph.nodes else None

    def seats(self, node: Node) -> str:
        """What every role takes beside the one base, and every phase beside the roles."""
        size = self.size(node)
        if not isinstance(node.stage, RolloutStage) or size is None:
            return ""
        model = self.model(node)
        lora = isinstance(model.adapter, LoraSettings)
        base = size.frozen_bytes(model.quantization, self.bytes_of(model)) if lora else 0
        found = seats(node, self.graph, size, own_reward=self.own_reward(node))
        told = [f"{each.role} {size_text(each.bytes)}{', a second copy' if each.own_base else ''}" for each in found]
        phases = {
            "an update": [b for name, b in self.update(node, node.stage, size).items() if name in UPDATING],
            "drawing": drawing_memory(node, size, self.bytes_of(model)).values(),
        }
        told += [f"{phase} {size_text(sum(parts))}" for phase, parts in phases.items()]
        return (f"one base of {size_text(base)}: " if lora else "") + "; ".join(told)

    def merging(self, node: Node) -> str:
        size = self.size_of_base(node.model) if node.model is not None and node.model.merge_parent else None
        return f"merging takes {size_text(size.parameters * MASTER_BYTES)} before training" if size else ""

    def positions(self, node: Node) -> str:
        size, train = self.size(node), getattr(node.stage, "train", None)
        if size is None or train is None or size.positions is None or train.max_tokens <= size.positions:
            return ""
        return f"max_tokens {train.max_tokens} is more than the {size.positions} positions the model was made for"

    def unknown(self, node: Node) -> str:
        trained = isinstance(node.stage, TrainedStage)
        nodes = [node] if trained else [self.graph.nodes[name] for name in models_used(node.stage)]
        bases = sorted({self.model(each).base for each in nodes if self.size(each) is None})
        named = ", ".join(bases)
        if trained and not self.config(node):
            return f"the size and the packing of {named} are known once it is downloaded"
        return f"the size of {named} is known once it is downloaded" if bases else ""


def size_text(bytes_: int | None) -> str:
    """Bytes in the unit that suits them; nothing for none."""
    if not bytes_:
        return ""
    return f"{bytes_ / GIB:.2f} GiB" if bytes_ >= GIB else f"{bytes_ / 2**20:.1f} MiB"
