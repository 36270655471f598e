"""What a measurement runs on: random models of fixed shapes, and the examples of one optimizer step.

Nothing is downloaded: neither speed nor memory depends on what the weights are, and the gate wants only that they are
the same for every arm. All arms of a shape share one frozen base; each has adapters of its own, with equal values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from align.data.chat import Completion, Example
from align.models.base import quantization_config
from align.models.platform import prepare_bitsandbytes
from align.models.roles import RoleModel
from align.spec.model import LoraSettings
from align.spec.train import PACK_TOKENS
from bench.arithmetic import Sizes, effective_tokens, lengths
from bench.memory import tensors_of

Kind = Literal["dpo", "reward", "rrhf"]
BETA = 0.1
LONGEST = 1024
"""Prompt + response; TRL cuts longer ones by default."""


@dataclass(frozen=True)
class Shape:
    """A model and how much of the data one optimizer step takes.

    Attributes:
        name: What the command line calls it.
        family: Which configuration class it has.
        hidden: h.
        intermediate: Width of the feed-forward part.
        layers: How many.
        heads: Query heads.
        kv_heads: Key-value heads.
        vocab: V.
        tied: Whether the head is the embedding.
        quantized: NF4; fp32 otherwise.
        half: Compute in bf16 where weights are quantised; in fp32 otherwise, as a recipe without a GPU does.
        rank: Of the adapters, on every linear layer; alpha is twice that.
        pairs: Pairs per optimizer step.
        prompts: Prompts of ranked candidates per optimizer step.
        repeats: Timed rounds.
        pack_tokens: Token budget of align's forward passes.
        scale: Lengths are divided by it.
        spread: Standard deviation of the random weights.
        ablated: Cases in which each technique is switched off too; all if None.
    """

    name: str
    family: Literal["llama", "qwen2"]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    quantized: bool = False
    half: bool = True
    rank: int = 8
    pairs: int = 8
    prompts: int = 2
    repeats: int = 5
    pack_tokens: int = PACK_TOKENS["cpu"]
    scale: int = 1
    spread: float = 0.05
    ablated: tuple[str, ...] | None = None

    @property
    def sizes(self) -> Sizes:
        """For the arithmetic."""
        head = self.hidden // self.heads
        return Sizes(
            self.hidden, self.intermediate, self.layers, self.hidden, self.kv_heads * head, self.vocab, self.rank
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.quantized and self.half else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """What accelerate puts around the forward pass of a bf16 run."""
        return torch.autocast(device.type, torch.bfloat16) if self.dtype is torch.bfloat16 else nullcontext()

    @property
    def adapter(self) -> LoraSettings:
        return LoraSettings(rank=self.rank, alpha=2 * self.rank, dropout=0.0, targets="all-linear")

    def ablates(self, case: str) -> bool:
        """Whether techniques are switched off in a case by default."""
        return self.ablated is None or case in self.ablated

    def quick(self) -> Shape:
        """Small enough to run the same code in seconds anywhere; its times mean nothing."""
        small = {"hidden": 64, "intermediate": 128, "layers": 2, "heads": 4, "kv_heads": min(self.kv_heads, 2)}
        fewer = {"vocab": 512, "rank": 4, "pairs": 4, "prompts": 1, "repeats": 1, "scale": 16}
        return replace(self, **small, **fewer, spread=0.1, ablated=None)

    def exact(self) -> Shape:
        """The same widths in fp32, on few layers where the whole would not fit: what the gate compares to 1e-5."""
        if not self.quantized:
            return self
        return replace(
            self, quantized=False, tied=False, layers=min(self.layers, 2), pairs=min(self.pairs, 4), prompts=1
        )

    def config(self) -> Any:
        """As transformers describes it."""
        family = LlamaConfig if self.family == "llama" else Qwen2Config
        return family(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
            initializer_range=self.spread,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )


def _published(name: str, **sizes: Any) -> Shape:
    """A published model as NF4 QLoRA."""
    return Shape(name, quantized=True, rank=16, pairs=16, prompts=4, repeats=5, pack_tokens=16384, spread=0.02, **sizes)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("small", "llama", 256, 768, 4, 4, 4, 8192, pairs=4,
              ablated=("dpo-512-128", "dpo-lognormal", "reward-512-128", "rrhf-k8-r4")),
        Shape("medium", "llama", 512, 1536, 8, 8, 8, 32_000, pairs=2, prompts=1, repeats=3, ablated=("dpo-512-128",)),
        _published("qwen-0.5b", family="qwen2", hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2,
                   vocab=151_936, tied=True),
        _published("qwen-1.5b", family="qwen2", hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2,
                   vocab=151_936, tied=True),
        _published("llama-8b", family="llama", hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8,
                   vocab=128_256),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A method and the lengths of its data.

    Attributes:
        name: What the command line calls it.
        kind: The method.
        prompt: P, or its mean.
        response: R, or its mean.
        k: Responses per prompt.
        cv: Coefficient of variation of lognormal lengths; 0 where all are equal.
    """

    name: str
    kind: Kind
    prompt: int
    response: int
    k: int = 2
    cv: float = 0.0

    def examples(self, shape: Shape) -> list[Example]:
        """The examples of one optimizer step, the same in every run."""
        g = torch.Generator().manual_seed(20)
        count = shape.prompts if self.kind == "rrhf" else shape.pairs
        return [self._example(i, shape, g) for i in range(count)]

    def _example(self, row: int, shape: Shape, g: torch.Generator) -> Example:
        length = lambda mean: _length(mean, self.cv, shape.scale, g)  # noqa: E731
        prompt = torch.randint(1, shape.vocab, (length(self.prompt),), generator=g).tolist()  # 0 pads
        often = _frequencies(shape.vocab)[1:]
        responses = [
            (1 + torch.multinomial(often, length(self.response), replacement=True, generator=g)).tolist()
            for _ in range(self.k)
        ]
        order = torch.randperm(self.k, generator=g).tolist() if self.kind == "rrhf" else range(self.k, 0, -1)
        completions = tuple(Completion(ids, [True] * len(ids), False) for ids in responses)
        return Example(row, prompt, completions, 1.0, scores=tuple(map(float, order)))


CASES = {
    case.name: case
    for case in (
        Case("dpo-256-256", "dpo", 256, 256),
        Case("dpo-512-128", "dpo", 512, 128),
        Case("dpo-128-512", "dpo", 128, 512),
        Case("dpo-lognormal", "dpo", 256, 256, cv=0.6),
        Case("reward-256-256", "reward", 256, 256),
        Case("reward-512-128", "reward", 512, 128),
        Case("rrhf-k4-r1", "rrhf", 128, 128, k=4),
        Case("rrhf-k4-r4", "rrhf", 512, 128, k=4),
        Case("rrhf-k8-r1", "rrhf", 128, 128, k=8),
        Case("rrhf-k8-r4", "rrhf", 512, 128, k=8),
    )
}


def _length(mean: int, cv: float, scale: int, g: torch.Generator) -> int:
    if cv == 0:
        return max(2, mean // scale)
    sigma = math.sqrt(math.log(1 + cv * cv))
    drawn = math.exp(math.log(mean) - sigma * sigma / 2 + sigma * float(torch.randn((), generator=g)))
    return int(min(max(drawn, 32), LONGEST // 2)) // scale


def _frequencies(vocab: int) -> Tensor:
    """[V] how frequent a response's tokens are: as the inverse cube of their number, 0.6 nats; the first pads."""
    return torch.cat([torch.tensor([vocab]), torch.arange(1, vocab)]).double() ** -3


class World:
    """A shape, a case, a device, and what follows from them.

    Args:
        shape: Of the model.
        case: Of the data.
        device: Where everything is.
        base: The frozen model, as `build_base` makes it; shared, never changed.
    """

    def __init__(self, shape: Shape, case: Case, device: torch.device, base: PreTrainedModel) -> None:
        self.shape, self.case, self.device, self.base = shape, case, device, base
        self.examples = case.examples(shape)
        self.lengths = lengths(self.examples)
        self.tokens = effective_tokens(self.lengths)
        self.role = "reward" if case.kind == "reward" else "policy"

    def autocast(self) -> AbstractContextManager[Any]:
        """What accelerate puts around the forward pass of a bf16 run."""
        return self.shape.autocast(self.device)

    def roles(self, *, checkpointing: bool = False) -> RoleModel:
        """The base under a trained adapter that is not the identity, and the reference, which is the base itself."""
        roles = RoleModel(copy_of(self.base), gradient_checkpointing=checkpointing)
        if self.case.kind == "dpo":
            roles.add_base_role("reference")
        roles.add_adapter(self.role, settings=self.shape.adapter, trainable=True)
        if self.role == "reward":
            roles.add_head(self.role)
        draw(roles.trainable_state())
        return roles.train()


def draw(tensors: Mapping[str, Tensor], seed: int = 7) -> None:
    """Fill an adapter, and a scalar head, with numbers that its names and shapes decide and that bf16 can hold."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in sorted(tensors.items()):
            noise = torch.randn(tensor.shape, generator=g) / math.sqrt(tensor.shape[1])
            tensor.copy_((0.05 * noise).bfloat16())


def build_base(shape: Shape, device: torch.device, seed: int = 3) -> PreTrainedModel:
    """A frozen causal LM with random weights, in NF4 where the shape says so."""
    config = shape.config()
    if not shape.quantized:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
        base.requires_grad_(False).eval()
        if not shape.tied:
            _know_frequencies(base, shape)
        return base
    prepare_bitsandbytes()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=shape.dtype)
    g = torch.Generator(device).manual_seed(seed)
    state = {name: _weight(name, t, shape, g) for name, t in empty.state_dict().items()}
    if shape.tied:
        state.pop("lm_head.weight")
    base = type(empty).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=shape.dtype,
        quantization_config=quantization_config("nf4", shape.dtype),
        device_map={"": device} if device.type == "cuda" else None,
    )
    return base.requires_grad_(False).eval()


@torch.no_grad()
def _know_frequencies(base: PreTrainedModel, shape: Shape) -> None:
    """Make the model expect the data's frequencies, through a feature that all tokens have.

    A random model gives 9 nats to every token, no policy does that to its data; sums over hundreds of tokens would then
    be so large that fp32 does not hold them to what the gate asks for.
    """
    base.get_input_embeddings().weight[:, 0] = 1.0
    ids = torch.arange(1, 65, device=base.device)[None] % shape.vocab
    feature = base.model(input_ids=ids).last_hidden_state[..., 0].mean()
    base.get_output_embeddings().weight[:, 0] = _frequencies(shape.vocab).log().to(feature) / feature


def _weight(name: str, like: Tensor, shape: Shape, g: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.ones(like.shape, dtype=like.dtype, device=g.device)
    return torch.randn(like.shape, dtype=like.dtype, device=g.device, generator=g) * shape.spread


def copy_of(base: PreTrainedModel) -> PreTrainedModel:
    """The same model with modules of its own, for adapters and hooks, and the same tensors."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors_of(base)}
    return copy.deepcopy(base, memo)
