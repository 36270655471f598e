"""Drawing completions beside transformers: `python -m bench.rollout`.

Arms run in turns in one process, after a gate that all of them say the same when they are greedy. The model is random
but for what makes its completions comparable: tokens count down to the end, so a completion's first token says how long
it is, and every arm draws the same lengths through its own sampling. The only exit code but 0 is 1, for a gate that
failed.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import logging
import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from align.models.platform import prepare_process
from align.models.roles import RoleModel
from align.models.tokenizer import train_tokenizer
from align.rollout import get_engine, sample
from align.spec.model import TokenizerSettings
from align.spec.stages import GenerationSettings
from bench.clock import in_turns, ratio, seconds
from bench.flips import FEW, MANY, Flips, flips
from bench.worlds import SHAPES, Shape

DEFAULTS = {"cpu": ["small"], "cuda": ["small", "qwen-0.5b"]}
NOTES = {
    "ours": "prompts once for their k completions, rows that end are filled again",
    "ours, rows": "the same, each completion with a prompt of its own",
    "ours, batches": "the same, batch after batch: no row is filled again",
    "generate": "transformers, left-padded batches of prompts of like length, num_return_sequences=k",
    "generate, static": "the same with a cache that is allocated once",
    "generate_batch": "transformers, continuous batching, at k > 1 with the first token in the prompt",
}
OTHER_LENGTHS = "{} draws other lengths than it should"
NOT_EXACT = "in fp32 on a CPU a completion depends on what is drawn beside it"
PAD, END, FIRST = 0, 1, 4
"""Token ids: padding, the end, and the one that counts 1."""
CERTAIN = 60.0
"""Logit of what is said next: certain, yet no other token's weight is so small that computing with it is slow."""


@dataclass(frozen=True)
class Case:
    """How long prompts and completions are.

    Attributes:
        prompt: Tokens of a prompt on average; from half to one and a half times as many.
        k: Completions of each.
        completions: In all.
        mean: Tokens of a completion on average before the longest are cut.
        cv: Coefficient of variation of lognormal lengths.
        longest: Tokens of the longest.
    """

    prompt: int
    k: int
    completions: int = 128
    mean: int = 48
    cv: float = 0.8
    longest: int = 160

    @property
    def name(self) -> str:
        return f"prompt {self.prompt}, k {self.k}"

    def lengths(self, n: int) -> list[int]:
        """Equally likely lengths: n quantiles of the distribution."""
        sigma = math.sqrt(math.log(1 + self.cv**2))
        normal = NormalDist(math.log(self.mean) - sigma**2 / 2, sigma)
        drawn = (math.exp(normal.inv_cdf((i + 0.5) / n)) for i in range(n))
        return [min(max(2, round(each)), self.longest) for each in drawn]


CASES = [Case(prompt, k) for prompt in (32, 128, 512) for k in (1, 8)]


class World:
    """A model that counts, prompts for it, and the lengths of their completions.

    Args:
        shape: Of the model.
        case: Of prompts and completions.
        device: Where it is.
        dtype: Of its weights.
    """

    def __init__(self, shape: Shape, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device = case, device
        self.base = random_base(shape, device, dtype)
        g = torch.Generator().manual_seed(11)
        n = case.completions // case.k
        widths = torch.randint(case.prompt // 2, case.prompt * 3 // 2 + 1, (n,), generator=g).tolist()
        self.lengths = case.lengths(case.k if case.k > 1 else n)
        if case.k == 1:
            self.lengths = [self.lengths[i] for i in torch.randperm(n, generator=g).tolist()]
        branch = FIRST + case.longest + 1
        draw = lambda width: torch.randint(branch + 1, shape.vocab, (width - 1,), generator=g).tolist()  # noqa: E731
        last = [branch] * n if case.k > 1 else [FIRST - 1 + each for each in self.lengths]
        self.prompts = [[*draw(max(2, width)), token] for width, token in zip(widths, last, strict=True)]
        teach_to_count(self.base, case, self.lengths if case.k > 1 else [], branch)
        self.roles = RoleModel(self.base)
        self.roles.add_base_role("policy")
        self.tokenizer = tokenizer()
        self.firsts = [FIRST - 2 + each for each in self.lengths]
        """The first token of each of k completions; that of its prompt's only one where k is 1."""
        per_prompt = sum(self.lengths) if case.k > 1 else 0
        self.tokens = n * per_prompt if case.k > 1 else sum(self.lengths)

    def settings(self, **changes: Any) -> GenerationSettings:
        return GenerationSettings(**{"max_new_tokens": self.case.longest, "batch_size": 64, **changes})

    def draws(self, prompt: int, completion: int) -> Tensor:
        """Numbers that choose each of the k lengths once; what follows is certain."""
        first = (completion + 0.5) / self.case.k
        return torch.cat([torch.tensor([first]), torch.full((self.case.longest - 1,), 0.5)]).double()


def random_base(shape: Shape, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    """A random decoder of a shape, without quantization."""
    config = replace(shape, tied=False, layers=layers or shape.layers).config()
    config.eos_token_id = END
    with torch.random.fork_rng():
        torch.manual_seed(3)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    base.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    return base.to(device, dtype).requires_grad_(False).eval()


@torch.no_grad()
def teach_to_count(base: Any, case: Case, lengths: Sequence[int], branch: int) -> None:
    """After the token that counts c comes that of c - 1, at last the end; after `branch`, one of the lengths.

    Layers compute as ever, but add so little that the last token decides; times do not depend on what they add.
    """
    for layer in base.model.layers:
        layer.self_attn.o_proj.weight.mul_(1e-3)
        layer.mlp.down_proj.weight.mul_(1e-3)
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    hidden, g = embedding.shape[1], torch.Generator().manual_seed(5)
    directions = torch.randn(case.longest + 1, hidden, generator=g)
    if len(directions) <= hidden:
        directions = torch.linalg.qr(directions.T).Q.T * math.sqrt(hidden)
    said_after = [END, *range(FIRST, FIRST + case.longest)]  # row c: what is said after the token that counts c + 1
    head.zero_()
    head[said_after] = (CERTAIN * directions / hidden).to(head)
    embedding[FIRST : FIRST + case.longest + 1] = directions.to(embedding)
    if lengths:
        embedding[branch] = directions[[each - 1 for each in lengths]].sum(0).to(embedding)


def tokenizer() -> Any:
    """The engines want one: it says what pads and what ends."""
    made = train_tokenizer(["a b c d"] * 8, TokenizerSettings(vocab_size=300))
    made.chat_template = None
    made.pad_token, made.eos_token = made.convert_ids_to_tokens([PAD, END])
    return made


# Arms --------------------------------------------------------------------------------------------------------------


def arms(world: World) -> dict[str, Callable[..., list[list[list[int]]]]]:
    """Name -> a function that draws all completions with some settings."""
    found: dict[str, Callable[..., list[list[list[int]]]]] = {
        "ours": ours,
        "generate": generate,
        "generate, static": partial(generate, cache_implementation="static", disable_compile=True),
        "generate_batch": generate_batch,
        "ours, batches": batches,
    }
    if world.case.k > 1:
        found["ours, rows"] = rows
    return found


def ours(world: World, settings: GenerationSettings) -> list[list[list[int]]]:
    """The local engine."""
    drawn = sample(
        world.roles, "policy", world.prompts, settings, world.tokenizer, completions=world.case.k, draws=world.draws
    )
    return [[each.ids for each in own] for own in drawn]


def rows(world: World, settings: GenerationSettings) -> list[list[list[int]]]:
    """The local engine, asked for one completion of every prompt k times."""
    k = world.case.k
    prompts = [prompt for prompt in world.prompts for _ in range(k)]
    draws = lambda row, _: world.draws(row // k, row % k)  # noqa: E731
    drawn = sample(world.roles, "policy", prompts, settings, world.tokenizer, draws=draws)
    return [[own[0].ids for own in drawn[i : i + k]] for i in range(0, len(drawn), k)]


def batches(world: World, settings: GenerationSettings) -> list[list[list[int]]]:
    """The local engine, asked for as much at once as it draws side by side."""
    found: list[list[list[int]]] = [[] for _ in world.prompts]
    for own in _batches(world, settings.batch_size):
        prompts = [world.prompts[i] for i in own]
        drawn = sample(
            world.roles, "policy", prompts, settings, world.tokenizer, completions=world.case.k, draws=world.draws
        )
        for i, each in zip(own, drawn, strict=True):
            found[i] = [one.ids for one in each]
    return found


@torch.no_grad()
def generate(world: World, settings: GenerationSettings, **cache: Any) -> list[list[list[int]]]:
    """transformers' `generate` as its user would call it: batches of like prompts, padded on the left."""
    found: list[list[list[int]]] = [[] for _ in world.prompts]
    greedy, k = settings.temperature == 0, world.case.k
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=END,
        pad_token_id=PAD,
        use_cache=True,
        **({"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}),
        **cache,
    )
    for own in _batches(world, settings.batch_size):
        prompts = [world.prompts[i] for i in own for _ in range(k if greedy else 1)]
        width = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts], device=world.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=world.device)
        first = [] if greedy or k == 1 else [_First(torch.tensor(world.firsts * len(own), device=world.device), width)]
        config.num_return_sequences = 1 if greedy else k
        out = world.base.generate(
            ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList(first)
        )
        drawn = [_until_end(row) for row in out[:, width:].tolist()]
        for place, i in enumerate(own):
            found[i] = drawn[place * k : (place + 1) * k]
    return found


class _First(LogitsProcessor):
    """Says the first token of every row: which lengths are drawn is no matter of luck. Afterwards it does nothing."""

    def __init__(self, tokens: Tensor, width: int) -> None:
        self.tokens, self.width = tokens, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self.width:
            return scores
        return torch.full_like(scores, -torch.inf).scatter_(1, self.tokens[:, None], 0.0)


def generate_batch(world: World, settings: GenerationSettings) -> list[list[list[int]]]:
    """transformers' `generate_batch`, through its engine; which length is drawn stands in the prompt."""
    k, engine = world.case.k, get_engine("transformers")
    if settings.temperature == 0 or k == 1:
        prompts = [prompt for prompt in world.prompts for _ in range(k)]
        drawn = engine.sample(world.roles, "policy", prompts, settings, world.tokenizer)
        return [[own[0].ids for own in drawn[i : i + k]] for i in range(0, len(drawn), k)]
    prompts = [[*prompt, first] for prompt in world.prompts for first in world.firsts]
    drawn = engine.sample(world.roles, "policy", prompts, settings, world.tokenizer)
    said = [[prompt[-1], *own[0].ids] for prompt, own in zip(prompts, drawn, strict=True)]
    return [said[i : i + k] for i in range(0, len(said), k)]


def _batches(world: World, rows: int) -> list[list[int]]:
    order = sorted(range(len(world.prompts)), key=lambda i: len(world.prompts[i]))
    size = max(1, rows // world.case.k)
    return [order[i : i + size] for i in range(0, len(order), size)]


def _until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(END) + 1] if END in ids else ids


# Gate and times ----------------------------------------------------------------------------------------------------


def gate(shape: Shape, device: torch.device) -> list[str]:
    """What is wrong, in words: greedy completions of a random model in fp32, token for token, and the lengths drawn."""
    case = Case(prompt=24, k=2, completions=48, longest=24, mean=12)
    world = World(shape, case, device, torch.float32)
    counted = {name: arm(world, world.settings()) for name, arm in arms(world).items()}
    failures = [
        f"{name} draws other lengths than it should" for name, own in counted.items() if not _as_said(world, own)
    ]
    _be_random(world, shape, torch.float32)
    greedy = {name: arm(world, world.settings(temperature=0.0, batch_size=10)) for name, arm in arms(world).items()}
    failures += [f"{name} is not generate" for name, own in greedy.items() if own != greedy["generate"]]
    if len({tuple(ids) for own in greedy["generate"] for ids in own}) < len(world.prompts) // 2:
        failures.append("greedy completions are too much alike to tell anything")
    return failures


def _be_random(world: World, shape: Shape, dtype: torch.dtype) -> None:
    """Put a model that says what its random weights say into the world."""
    world.base = random_base(shape, world.device, dtype, layers=min(4, shape.layers))
    world.base.model.norm.weight.mul_(4)  # far from uniform, so that rounding decides nothing when it is greedy
    world.roles = RoleModel(world.base)
    world.roles.add_base_role("policy")


def flips_of(shape: Shape, device: torch.device, completions: int) -> dict[str, Flips]:
    """dtype -> how often a token depends on what is drawn beside it."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        world = World(shape, Case(prompt=24, k=1, completions=completions // 2, longest=48, mean=24), device, dtype)
        _be_random(world, shape, dtype)
        found[str(dtype).removeprefix("torch.")] = flips(world.roles, world.prompts, world.tokenizer, 48)
    return found


def _as_said(world: World, drawn: list[list[list[int]]]) -> bool:
    """Whether each completion has the length that was to be drawn, and counts down."""
    lengths = [world.lengths] * len(drawn) if world.case.k > 1 else [[each] for each in world.lengths]
    said = [[[*range(FIRST - 2 + n, FIRST - 1, -1), END] for n in own] for own in lengths]
    return drawn == said


def measure(world: World, rounds: int) -> dict[str, Any]:
    """Times of all arms in turns, each of which draws the same tokens; a GPU gets a round before the first."""
    wrong: set[str] = set()

    def once(name: str, arm: Callable[..., list[list[list[int]]]]) -> float:
        drawn: list[list[list[int]]] = []
        taken = seconds(lambda: drawn.extend(arm(world, world.settings())), world.device)
        if not _as_said(world, drawn):
            wrong.add(name)
        return taken

    found = {name: partial(once, name, arm) for name, arm in arms(world).items()}
    if world.device.type == "cuda":
        in_turns(found, 1)
    times = in_turns(found, rounds)
    if wrong:
        return {"failures": [OTHER_LENGTHS.format(name) for name in sorted(wrong)]}
    return {
        "failures": [],
        "tokens": world.tokens,
        "completions": world.case.completions,
        "seconds": {name: list(each.seconds) for name, each in times.items()},
        "arms": {
            name: {
                "median": each.median,
                "spread": each.spread,
                "tokens_per_second": world.tokens / each.median,
                "completions_per_second": world.case.completions / each.median,
                "beside_ours": ratio(each, times["ours"]),
            }
            for name, each in times.items()
        },
    }


def print_case(console: Console, shape: str, case: Case, found: dict[str, Any]) -> None:
    """Times, speeds and ratios of a case."""
    table = Table(title=f"{shape}, {case.name}: {found['completions']} completions, {found['tokens']} tokens")
    for name in ("arm", "s", "from, to", "tokens/s", "completions/s", "beside ours"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for name, arm in found["arms"].items():
        low, high = arm["spread"]
        table.add_row(
            name,
            f"{arm['median']:.2f}",
            f"{low:.2f}, {high:.2f}",
            f"{arm['tokens_per_second']:,.0f}",
            f"{arm['completions_per_second']:,.1f}",
            "" if name == "ours" else f"{arm['beside_ours']:.2f}x",
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and tabulate."""
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=sorted(DEFAULTS), default="cpu")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="may be repeated")
    parser.add_argument("--prompt", action="append", type=int, help="only these lengths of prompts")
    parser.add_argument("--k", action="append", type=int, help="only these numbers of completions")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: the code, not the times")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where all figures go")
    options = parser.parse_args(argv)
    prepare_process()
    console = Console(width=None if sys.stdout.isatty() else 120)
    device = torch.device(options.device)
    console.print(_machine(device))
    for name, note in NOTES.items():
        console.print(f"  {name}: {note}")
    console.print("  64 rows side by side, temperature 1; medians of rounds in turns; x: how many times ours takes")
    record: dict[str, Any] = {"machine": _machine(device), "cases": []}
    with _quiet():
        for name in options.shape or DEFAULTS[options.device]:
            record["cases"] += list(_shape(console, name, device, options))
    if options.quick:
        console.print("[yellow]--quick: these times and ratios mean nothing")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))
    return 1 if any(case["failures"] for case in record["cases"]) else 0


def _shape(console: Console, name: str, device: torch.device, options: Any) -> Iterator[dict[str, Any]]:
    shape = SHAPES[name].quick() if options.quick else SHAPES[name]
    failures = gate(shape, device)
    for failure in failures:
        console.print(f"[red]{name}: gate failed, so nothing is timed: {failure}")
    if failures:
        yield {"shape": name, "failures": failures}
        return
    console.print(f"{name}: gate passed in fp32: greedy completions of all arms are the same, token for token")
    flipped = flips_of(shape, device, 16 if options.quick else 256)
    told = "; ".join(f"{dtype}: {found}" for dtype, found in flipped.items())
    console.print(f"{name}: drawn {MANY} and {FEW} rows side by side: {told}")
    failures = [NOT_EXACT] if device.type == "cpu" and flipped["float32"].differing else []
    yield {"shape": name, "failures": failures, "flips": {t: asdict(f) for t, f in flipped.items()}}
    dtype = torch.bfloat16 if SHAPES[name].quantized else torch.float32
    for case in CASES:
        if (options.prompt and case.prompt not in options.prompt) or (options.k and case.k not in options.k):
            continue
        if options.quick:
            case = replace(case, prompt=case.prompt // 8, completions=16, mean=8, longest=24)
        found = measure(World(shape, case, device, dtype), 1 if options.quick else options.rounds)
        yield {"shape": name, "case": asdict(case)} | found
        if found["failures"]:
            console.print(f"[red]{name}, {case.name}: nothing is timed: {', '.join(found['failures'])}")
        else:
            print_case(console, name, case, found)


def _machine(device: torch.device) -> str:
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"{processor}, {torch.get_num_threads()} threads; python {platform.python_version()}, {versions}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what continuous batching says of its sizes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


if __name__ == "__main__":
    sys.exit(main())
