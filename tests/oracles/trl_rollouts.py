"""TRL's trainers on rollouts as oracle: advantages, loss and gradient from the same log-probabilities, in fp64.

What TRL samples, scores and computes with models is handed to it; everything that it makes of that is its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from align.methods import get_method
from align.types import Rollout, RolloutLogps
from tests.methods.batches import config_of
from tests.methods.rollouts import COMPLETIONS, learnt, padded, random_rollout
from tests.oracles.trl_oracle import small_tokenizer, tiny, trl

LONGEST = 16
"""Tokens of the longest possible completion."""

POLICY = object()
"""Stands for the model that is trained where a trainer of TRL asks for log-probabilities."""


def trainer_of(tmp_path: Any, name: str, rollout: Rollout, settings: dict[str, Any]) -> Any:
    """TRL's trainer of that name, which samples what the rollout holds."""
    tokenizer, count, folder = small_tokenizer(), len(rollout.length), str(tmp_path / "model")
    tiny(tokenizer, 0).save_pretrained(folder)
    args = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        per_device_train_batch_size=count, per_device_eval_batch_size=count, num_generations=COMPLETIONS,
        max_completion_length=LONGEST, num_iterations=2, beta=rollout.beta, **settings,
    )  # fmt: skip
    trainer = getattr(trl, f"{name}Trainer")(
        model=folder, reward_funcs=lambda **_: None, args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "Sing "}] * count),
    )  # fmt: skip
    trainer.model.eval()  # when it trains, the loss is divided by how many micro-batches are accumulated
    ends = [tokenizer.eos_token_id if kept else 5 for kept in rollout.kept.tolist()]
    ids = [[5] * (n - 1) + [end] for n, end in zip(rollout.length.tolist(), ends, strict=True)]
    prompts, texts = [[7, 8]] * count, ["a song"] * count
    beside = {"GRPO": (None, texts, None, {}, None, None), "RLOO": (texts,)}[name]
    trainer._generate = lambda _: (prompts, ids, *beside)
    trainer._calculate_rewards = lambda *_: rollout.scores[:, None]
    return trainer


def of_trl(trainer: Any, rollout: Rollout, batch: RolloutLogps) -> tuple[Tensor, Tensor]:
    """Its advantages of completions, [C], and its loss."""
    said = {
        id(trainer.model): rollout.logps,
        id(trainer.ref_model): rollout.reference,
        id(POLICY): batch.policy,
    }

    def logps_and_entropies(model: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return padded(said[id(model)], rollout.length), padded(batch.entropy, rollout.length), None

    trainer._get_per_token_logps_and_entropies = logps_and_entropies
    inputs = trainer._generate_and_score_completions([{"prompt": "Sing "}] * len(rollout.length))
    return inputs["advantages"], trainer._compute_loss(POLICY, inputs)


def assert_rollout_equals_trl(
    tmp_path: Any, kind: str, settings: dict[str, Any], *, beta: float = 0.1, dropped: bool = False, **trl_settings: Any
) -> None:
    """Advantages, loss and gradient of TRL's trainer to 1e-9.

    Args:
        tmp_path: Where it may write.
        kind: The method; its name in capitals is the trainer's.
        settings: Of the method, beside beta.
        beta: KL coefficient of both.
        dropped: Whether some completions are left out of the loss. Where TRL takes a mean over completions it counts
            them nevertheless, so that its loss is smaller by the share of the others.
        trl_settings: What the trainer calls the same settings.
    """
    method, rollout = get_method(kind), replace(random_rollout(3, seed=3), beta=beta)
    if not dropped:
        rollout = replace(rollout, kept=torch.ones_like(rollout.kept))
    config = config_of(method, beta=beta, **settings)
    batch = learnt(method, rollout, config)
    batch = replace(batch, weight=rollout.kept.to(batch.weight.dtype))
    theirs, own = (replace(batch, policy=batch.policy.clone().requires_grad_()) for _ in range(2))
    advantages, expected = of_trl(trainer_of(tmp_path, kind.upper(), rollout, trl_settings), rollout, theirs)
    if dropped and settings.get("aggregation") != "token_mean":
        expected = expected / rollout.kept.double().mean()
    expected.backward()
    out = method.loss(own, config)
    out.loss.backward()
    assert 0 < out.metrics["policy/clip_fraction"].value.item() < 1, "clipping is not compared"
    torch.testing.assert_close(batch.advantages[rollout.last], advantages, rtol=0, atol=1e-9)
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(own.policy.grad, theirs.policy.grad, rtol=0, atol=1e-9)
