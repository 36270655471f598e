"""The gate before any timing: every arm computes what a plain computation does, or no time is printed.

Plain is one sequence per forward pass, without padding, mask, packs or tiles, and the losses written out. In fp32 an
arm may differ from it, and from TRL, by rounding alone. In bf16 nothing is equal: there an arm may be no further from
the fp32 computation on the same 4-bit weights than TRL is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align.data.chat import Example
from bench.arms import PLAIN_ROWS, Arm, forget
from bench.memory import peak_bytes
from bench.worlds import BETA, World

LOSS, LOGPS, GRADIENT = 1e-5, 1e-4, 1e-4
"""Most difference of losses, of log-probabilities of single tokens (or rewards), and relative of gradients, in fp32."""
SLACK = 1.1
"""How many times TRL's distance from the fp32 computation an arm in bf16 may have."""


@dataclass(frozen=True)
class Result:
    """What a step came to.

    Attributes:
        loss: Of the step.
        values: Log-probabilities of response tokens, or rewards.
        gradient: Of everything trained, one after the other in the order of the names.
        peak: Live tensor memory of the step, in bytes.
    """

    loss: float
    values: Tensor
    gradient: Tensor
    peak: int = 0


@dataclass(frozen=True)
class Distance:
    """How far one result is from another: losses, worst and typical value, relative gradient."""

    loss: float
    values: float
    typical: float
    gradient: float

    @classmethod
    def of(cls, found: Result, expected: Result) -> Distance:
        """NaN anywhere makes it NaN, which no limit admits."""
        apart = (found.values - expected.values).double()
        return cls(
            abs(found.loss - expected.loss),
            float(apart.abs().max()),
            float(apart.square().mean().sqrt()),
            float((found.gradient - expected.gradient).norm() / expected.gradient.norm()),
        )

    @property
    def equal(self) -> bool:
        """Within fp32's rounding."""
        return self.loss <= LOSS and self.values <= LOGPS and self.gradient <= GRADIENT

    def no_further_than(self, peer: Distance) -> bool:
        """In bf16; a single loss is as far as it happens to be."""
        return self.typical <= SLACK * peer.typical and self.gradient <= SLACK * peer.gradient


def plain(world: World) -> Result:
    """The same step, computed without any technique."""
    roles = world.roles()
    if world.shape.quantized:
        _in_fp32(roles.base)
    total, values = 0.0, []
    for example in world.examples:
        policy = [roles(world.role, _value, example, k) for k in range(world.case.k)]
        reference = []
        if world.case.kind == "dpo":
            with torch.no_grad():
                reference = [roles("reference", _value, example, k) for k in range(world.case.k)]
        loss = _loss(world, example, policy, reference) / len(world.examples)
        loss.backward()
        total += float(loss.detach())
        values.extend(p.detach().float().cpu() for p in policy)
    return Result(total, torch.cat(values), _gradient(roles.trainable_state()))


def _value(causal_lm: Any, example: Example, k: int, head: Any = None) -> Tensor:
    """[R] log-probabilities of a response's tokens, or its [1] reward."""
    prompt, response = example.prompt_ids, example.completions[k].ids
    ids = torch.tensor([prompt + response], device=next(causal_lm.parameters()).device)
    if head is not None:
        return head(causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1:].float())[:, 0]
    logits = causal_lm(input_ids=ids, use_cache=False).logits[0].float()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]


def _loss(world: World, example: Example, policy: list[Tensor], reference: list[Tensor]) -> Tensor:
    """Of one example, in fp64, so that the order of a sum does not matter."""
    if world.case.kind == "reward":
        return -F.logsigmoid(policy[0] - policy[1]).double().sum()
    if world.case.kind == "dpo":
        chosen, rejected = (p.double().sum() - r.double().sum() for p, r in zip(policy, reference, strict=True))
        return -F.logsigmoid(BETA * (chosen - rejected))
    means = [p.double().mean() for p in policy]
    scores = example.scores
    worse = [F.relu(means[i] - means[j]) for i in range(len(means)) for j in range(len(means)) if scores[i] < scores[j]]
    return torch.stack(worse).sum() - means[max(range(len(means)), key=lambda i: scores[i])]


def _in_fp32(base: nn.Module) -> None:
    """Compute with the 4-bit weights in fp32; tensors that other copies share are left as they are."""
    from bitsandbytes.nn import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            bias = module.bias
            module.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad and parameter.is_floating_point():
                setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))


def measured(arm: Arm, device: torch.device) -> Result:
    """One step of an arm: its numbers and its live memory."""
    found: list[Any] = []

    def run() -> None:
        found.extend((float(arm.step()), _gradient(arm.parameters())))
        forget(arm)

    with arm.switched():
        values = arm.values()
        peak = peak_bytes(run, device)
    return Result(found[0], values, found[1], peak)


def _gradient(parameters: dict[str, Tensor]) -> Tensor:
    """Copied by numpy, whose memory is not counted as tensors'."""
    parts = []
    for _, parameter in sorted(parameters.items()):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parts.append(torch.from_numpy(gradient.float().cpu().numpy().flatten().astype("float64")))
    return torch.cat(parts)


@dataclass(frozen=True)
class Gate:
    """The verdict on a case.

    Attributes:
        distances: Arm -> distance from the plain computation.
        failures: What is not equal, in words; empty if the gate is passed.
    """

    distances: dict[str, Distance]
    failures: list[str]


def judge(expected: Result, results: dict[str, Result], peers: Sequence[str], *, exact: bool) -> Gate:
    """Compare every arm with the plain computation, and align with its peers.

    Args:
        expected: The plain computation.
        results: Arm -> result.
        peers: Which arms are TRL's; without one, padded rows stand in for it in bf16.
        exact: Whether everything was computed in fp32.
    """
    distances = {name: Distance.of(result, expected) for name, result in results.items()}
    failures = []
    if exact:
        failures += [f"{name} is not the plain computation: {_told(d)}" for name, d in distances.items() if not d.equal]
        for peer in peers:
            apart = Distance.of(results["ours"], results[peer])
            if not apart.equal:
                failures.append(f"ours is not {peer}: {_told(apart)}")
        return Gate(distances, failures)
    others = [distances[name] for name in (peers or [PLAIN_ROWS])]
    worst = Distance(0.0, 0.0, max(d.typical for d in others), max(d.gradient for d in others))
    for name, distance in distances.items():
        if name not in (*peers, PLAIN_ROWS) and not distance.no_further_than(worst):
            failures.append(f"{name} is further from fp32 than its peer: {_told(distance)} against {_told(worst)}")
    return Gate(distances, failures)


def _told(d: Distance) -> str:
    return f"loss {d.loss:.1e}, log-prob {d.values:.1e} (rms {d.typical:.1e}), gradient {d.gradient:.1e}"
