"""A tiny base, tiny data, and one training run on it: shared by the tests of the trainer and of several ranks."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from align.data import PromptExample
from align.data.chat import Completion, Example
from align.logps import head
from align.logps.cache import RowCache
from align.methods import Method, get_method
from align.models import load_base, new_base, train_tokenizer
from align.models.platform import prepare_process
from align.models.roles import RoleModel
from align.models.tokenizer import load_tokenizer
from align.spec.model import Architecture, LoraSettings, TokenizerSettings
from align.spec.train import LaunchSettings, LoggingSettings, TrainSettings
from align.training import collectives
from align.training.arguments import deepspeed_config, training_arguments
from align.training.buffer import Buffer
from align.training.online import REWARD, Judges, Online, _Part
from align.training.reference import References
from align.training.rollout_step import CRITIC, RolloutStep
from align.training.schedule import RolloutSchedule, Schedule
from align.training.step import Step
from align.training.trainer import AlignTrainer, Silent
from align.types import Batch, Needs
from tests.methods.batches import config_of

VOCAB = 300


def save_tiny_base(folder: Path) -> Path:
    """A random Llama (hidden 64, two layers) with its tokenizer, as a Hugging Face folder."""
    tokenizer = train_tokenizer(["the sea is wide and the hills are green " * 4], TokenizerSettings(vocab_size=VOCAB))
    sizes = Architecture(hidden_size=64, intermediate_size=96, layers=2, heads=2, max_positions=128)
    base = new_base(sizes, tokenizer, seed=0)
    with torch.no_grad():
        for p in base.parameters():
            if p.dim() > 1:
                p.mul_(5)  # far from uniform, so that a wrong mask or shift shows in the loss
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_examples(n: int, completions: int, seed: int = 0, longest: int = 24) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    ids = lambda k: torch.randint(5, 260, (k,), generator=g).tolist()  # noqa: E731
    size = lambda low: int(torch.randint(low, longest, (1,), generator=g))  # noqa: E731
    out = []
    for i in range(n):
        parts = []
        for _ in range(completions):
            body = ids(size(1))
            parts.append(Completion(body, [True] * len(body), False))
        out.append(Example(i, ids(size(2)), tuple(parts), 1.0))
    return out


def examples_of(method: Method, n: int, seed: int = 0) -> list[Example]:
    """Random examples of a method's batch kind; ranked ones have two to four candidates, some of them equally good."""
    if method.batch is Batch.UNPAIRED:  # the second completion is another prompt's
        return [replace(e, scores=(float(i % 3 > 0),)) for i, e in enumerate(random_examples(n, 2, seed))]
    if method.batch is not Batch.RANKED:
        return random_examples(n, 2 if method.batch is Batch.PAIRED else 1, seed)
    found = random_examples(n, 4, seed)
    counts = torch.randint(2, 5, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        replace(e, completions=e.completions[:k], scores=(3.0, 1.0, 1.0, 2.0)[:k])
        for e, k in zip(found, counts, strict=True)
    ]


@dataclass
class Checksum:
    """A scorer: a number in [0, 1) that any change of a completion changes, and its name."""

    name: str = "x"

    def score(self, prompt: str, completion: str) -> float:
        return zlib.crc32(f"{self.name}|{prompt}|{completion}".encode()) % 997 / 997


ONLINE = {
    "prompts_per_rollout": 15,
    "completions": 3,
    # Random text ends by itself about every second time.
    "generation": {"max_new_tokens": 6, "stop": ["a", "e", "i", "s", "t", " "]},
}
"""Settings of stages on rollouts: three updates each, of 5 prompts; on two ranks 8 and 7 prompts are drawn, and 3 and 2
are trained on."""


def random_prompts(tokenizer: Any, n: int = 24) -> list[PromptExample]:
    """Prompts of unequal length; 24 of them are more than one rollout and less than two."""
    found = []
    for e in random_examples(n, 1, seed=2, longest=12):
        text = tokenizer.decode(e.prompt_ids)
        found.append(PromptExample(e.row, text, [{"role": "user", "content": text}], e.prompt_ids))
    return found


@dataclass
class Run:
    """One tiny training run, to be made on any number of ranks."""

    base: Path
    work: Path
    kind: str = "sft"
    quantization: str = "none"
    adapter: bool = True
    checkpointing: bool = False
    deepspeed: str = "none"
    steps: int = 4
    pack_tokens: int = 64
    save_every: int = 100
    validation: int = 0
    learning_rate: float = 1e-2
    scheduler: str = "constant"
    tile_elements: int = 2**24
    reference_rows: Path | None = None
    """Where the reference's rows are kept; in the work folder if absent."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a stage on rollouts beside `ONLINE`."""
    texts: int = 0
    """Texts to mix in."""
    same_rollouts: Path | None = None
    """Work folder of another run, whose completions are taken from the second rollout on: trained weights differ by
    rounding, and sooner or later one of many draws falls on the other side of a border between two tokens."""
    parameter_hook: Any = None
    """Called with (trainer, rank) before the run; tests inject faults here."""

    def trainer(self) -> AlignTrainer:
        prepare_process()
        head.TILE_ELEMENTS = self.tile_elements
        self.work.mkdir(parents=True, exist_ok=True)
        method = get_method(self.kind)
        online = method.batch is Batch.ROLLOUT
        settings = TrainSettings(
            max_steps=self.steps, global_batch_size=5 if online else 6, learning_rate=self.learning_rate,
            lr_scheduler=self.scheduler, warmup_ratio=0, log_every_steps=1, save_every_steps=self.save_every,
            validation={"every_steps": 2} if self.validation and not online else None, pack_tokens=self.pack_tokens,
        )  # fmt: skip
        config = copy.deepcopy(deepspeed_config(self.deepspeed))
        if config and self.deepspeed == "zero3":
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # really shard these tiny tensors
        args = training_arguments(
            settings, work=self.work, total_steps=self.steps, launch=LaunchSettings(deepspeed=self.deepspeed),
            logging=LoggingSettings(), bf16=False, use_cpu=True, deepspeed=config,
        )  # fmt: skip
        roles = RoleModel(
            load_base(self.base, quantization=self.quantization), gradient_checkpointing=self.checkpointing
        )
        role, trained = None, "reward" if Needs.REWARDS in method.needs else "policy"
        if self.adapter:
            roles.add_adapter(trained, settings=LoraSettings(rank=4, alpha=8), trainable=True, seed=0)
            if method.reference:
                roles.add_adapter("reference", copy_of="policy", trainable=False)
                role = "reference"
        else:
            roles.train_base(trained)
            role = "policy" if method.reference else None
        if trained == "reward":
            roles.add_head(trained, seed=0)
        source = self._rollouts(method, settings, roles) if online else self._examples(method, settings, role)
        return AlignTrainer(roles, args, work=self.work, **source)

    def _examples(self, method: Method, settings: TrainSettings, role: str | None) -> dict[str, Any]:
        """What the trainer of a kind that reads data is given."""
        examples, held_out = examples_of(method, 24), examples_of(method, self.validation, seed=1)
        references = None
        if method.reference:
            cache = RowCache(self.reference_rows or self.work / "reference")
            references = References({"train": examples, "validation": held_out}, cache)
        return {
            "step": Step(method, config_of(method), self.pack_tokens),
            "schedule": Schedule.of(settings, len(examples)),
            "examples": examples,
            "validation": held_out,
            "validation_settings": settings.validation,
            "references": references,
            "reference_role": role,
            "same_reference": True,
        }

    def _rollouts(self, method: Method, settings: TrainSettings, roles: RoleModel) -> dict[str, Any]:
        """What the trainer of a kind that draws its own completions is given, and every role's seat."""
        given = {**ONLINE, "reward": "x", "train": settings, **self.settings}
        config, tokenizer = config_of(method, **given), load_tokenizer(self.base)
        if config.reward is not None:
            lora = LoraSettings(rank=2, alpha=4)
            roles.add_adapter(REWARD, settings=lora, trainable=False, seed=3)
            roles.add_head(REWARD, seed=4)
        if Needs.VALUES in method.needs:
            roles.add_adapter(CRITIC, copy_of="policy", trainable=True)
            roles.add_head(CRITIC, seed=5)
        prompts = random_prompts(tokenizer)
        schedule = RolloutSchedule.of(config, len(prompts))
        names = config.scorers
        online = Online(
            config, method, prompts=prompts,
            judges=Judges(
                {name: (name, Checksum(name)) for name in names},
                {name: config.weights.get(name, 1.0) for name in [REWARD, *names]},
                None if config.reward is None else "shared",
            ),
            schedule=schedule, tokenizer=tokenizer, reference=config.reference is not None,
            texts=random_examples(self.texts, 1, seed=6), synced=self.deepspeed == "zero3", work=self.work,
            report=Silent(),
        )  # fmt: skip
        if self.same_rollouts is not None:
            take_completions(online, self.same_rollouts)
        rate = getattr(config, "critic_learning_rate", None)
        return {
            "step": RolloutStep(method, config, self.pack_tokens),
            "schedule": schedule,
            "online": online,
            "learning_rates": {CRITIC: rate} if rate else {},
        }


def take_completions(online: Online, other: Path) -> None:
    """Have a run draw its first rollout alone."""
    own = online._draw

    def draw(model: Any, number: int, asked: Any) -> _Part:
        if not number:
            return own(model, number, asked)
        places, k = list(range(len(asked)))[collectives.rank() :: collectives.world_size()], online.stage.completions
        whole = rollout_of(other, number)
        share = lambda rows: [rows[place * k : (place + 1) * k] for place in places]  # noqa: E731
        return _Part(places, share(whole.completions), share(whole.ended), scores={})

    online._draw = draw


def rollout_of(work: Path, number: int) -> Buffer:
    """A rollout that a run has kept."""
    return Buffer.read(work / "rollouts" / f"rollout-{number:06d}")


def losses(trainer: AlignTrainer, key: str = "loss") -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def fit(rank: int, world: int, run: Run) -> dict[str, Any]:
    """Train and tell the losses, the gradient norms and the final tensors."""
    trainer = run.trainer()
    if run.parameter_hook is not None:
        run.parameter_hook(trainer, rank)
    trainer.fit()
    return {
        "losses": losses(trainer),
        "eval_losses": losses(trainer, "eval_loss"),
        "grad_norms": losses(trainer, "grad_norm"),
        "state": {k: v.numpy() for k, v in trainer.final_state.items()},
        "resumed": trainer.resumed_from_step,
        "work": run.work,
        "wrapper": type(trainer.model_wrapped).__name__,
        "sharded": any(hasattr(p, "ds_id") and p.numel() == 0 for p in trainer.model.parameters()),
        "online": trainer.online and last_rollout(trainer.online),
    }


def last_rollout(online: Online) -> dict[str, Any]:
    """What is known of it, without tensors, so that another process can be told."""
    assert online.buffer is not None
    buffer, rollout = online.buffer, online.buffer.rollout
    found = {name: getattr(rollout, name) for name in ("scores", "logps", "reference", "values")}
    found |= {"advantages": buffer.made.advantages, "returns": buffer.made.returns}
    return {name: None if t is None else t.numpy() for name, t in found.items()} | {
        "completions": buffer.completions,
        "ended": buffer.ended,
        "progress": buffer.progress,
        "stopped": online.stopped,
    }
