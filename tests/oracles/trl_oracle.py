"""TRL's own trainers as oracle: our loss and gradients on the same token ids and the same two models."""

from __future__ import annotations

import importlib

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from align.data.chat import Completion, Example
from align.logps import completion_logps
from align.methods import get_method
from align.models import train_tokenizer
from align.spec.model import TokenizerSettings
from align.training.step import Step, Totals, scaled_loss
from tests.methods.batches import config_of

trl = pytest.importorskip("trl", reason="TRL is an extra: pip install align[trl]")

PAIRS = [
    {"prompt": "Tell me about the sea. ", "chosen": "It is wide and blue.", "rejected": "no"},
    {"prompt": "And the hills? ", "chosen": "Green.", "rejected": "The hills are not far from here, they say."},
    {"prompt": "Sing ", "chosen": "a song of the road", "rejected": "a song"},
]


def small_tokenizer():
    texts = [" ".join(p.values()) for p in PAIRS] * 4
    return train_tokenizer(texts, TokenizerSettings(vocab_size=300))


def tiny(tokenizer, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).float()


def ours(kind: str, policy, reference, examples, pack_tokens: int, **settings):
    """Loss and gradients through packs, statistics, terms and the exact reduction."""
    method = get_method(kind)
    step = Step(method, config_of(method, **settings), pack_tokens)
    call = lambda model: lambda role, function, *args: function(model, *args)  # noqa: E731
    call_reference = call(reference)
    references = None
    if method.reference:
        wrapped = type(
            "Roles", (), {"parameters": reference.parameters, "__call__": lambda s, *a: call_reference(*a)}
        )()
        references = completion_logps(wrapped, "reference", examples, pack_tokens)
    packs, statistic = step.packs(examples), Totals()
    weights = step.weights(examples, packs)
    with torch.no_grad():
        for pack in step.mismatched(examples):
            statistic.add(step.statistics(call(policy), pack, examples, references))
    statistics = {name: torch.tensor(value / weight) for name, (value, weight) in statistic.numbers().items()}
    policy.zero_grad()
    loss = 0.0
    for pack in packs:
        share = scaled_loss(step.terms(call(policy), pack, examples, references, statistics), weights)
        share.backward()
        loss += share.item()
    return loss, torch.cat([p.grad.flatten() for p in policy.parameters()]), len(packs)


def assert_equal(trainer, rows, policy, reference, kind: str, examples, pack_tokens: int, settings: dict) -> None:
    """Loss to 1e-5 and gradients to 1e-4 relative of a trainer of TRL on the same rows."""
    policy.eval()
    expected = trainer.compute_loss(policy, trainer.data_collator(rows))
    policy.zero_grad()
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    loss, own, packs = ours(kind, policy, reference, examples, pack_tokens, **settings)
    assert packs > 1 or pack_tokens > 1000
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert (own - gradient).norm() / gradient.norm() < 1e-4


def completion(ids) -> Completion:
    return Completion(list(ids), [True] * len(ids), False)


def arguments(cls, tmp_path, **extra):
    return cls(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        per_device_train_batch_size=len(PAIRS), max_length=None, disable_tqdm=True, **extra,
    )  # fmt: skip


def assert_pairs_equal_trl(
    tmp_path, kind: str, loss_type: str, settings: dict, pack_tokens: int, **trl_settings
) -> None:
    """TRL's DPOTrainer with that `loss_type`; the first of our settings is its beta."""
    tokenizer = small_tokenizer()
    policy, reference = tiny(tokenizer, 0), tiny(tokenizer, 1)
    beta = next(iter(settings.values()))
    args = arguments(trl.DPOConfig, tmp_path, loss_type=loss_type, beta=beta, **trl_settings)
    trainer = trl.DPOTrainer(
        model=policy, ref_model=reference, args=args, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer
    )
    rows = list(trainer.train_dataset)
    examples = [
        Example(i, list(r["prompt_ids"]), (completion(r["chosen_ids"]), completion(r["rejected_ids"])), 1.0)
        for i, r in enumerate(rows)
    ]
    assert_equal(trainer, rows, policy, reference, kind, examples, pack_tokens, settings)


def assert_free_pairs_equal_trl(
    tmp_path, kind: str, name: str, settings: dict, pack_tokens: int, **trl_settings
) -> None:
    """An experimental trainer of TRL without a reference, on rows whose two completions share their prompt's ids."""
    module = importlib.import_module(f"trl.experimental.{name.lower()}")
    config, trainer = getattr(module, f"{name}Config"), getattr(module, f"{name}Trainer")
    tokenizer = small_tokenizer()
    policy = tiny(tokenizer, 0)
    built = trainer(
        model=policy, args=arguments(config, tmp_path, **trl_settings), train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )  # fmt: skip
    rows, examples = [], []
    for i, pair in enumerate(PAIRS):
        prompt = tokenizer(pair["prompt"])["input_ids"]
        sides = {side: tokenizer(pair[side])["input_ids"] + [tokenizer.eos_token_id] for side in ("chosen", "rejected")}
        row = dict(pair) | _columns("prompt", prompt)
        for side, ids in sides.items():
            row |= _columns(side, prompt + ids) | {f"{side}_labels": [-100] * len(prompt) + ids}
        rows.append(row)
        examples.append(Example(i, prompt, tuple(completion(ids) for ids in sides.values()), 1.0))
    assert_equal(built, rows, policy, None, kind, examples, pack_tokens, settings)


def _columns(name: str, ids: list[int]) -> dict:
    return {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids)}


def assert_unpaired_equals_trl(tmp_path, kind: str, settings: dict, pack_tokens: int, **trl_settings) -> None:
    """TRL's KTOTrainer, with its own mismatched completions."""
    tokenizer = small_tokenizer()
    policy, reference = tiny(tokenizer, 0), tiny(tokenizer, 1)
    data = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for pair in PAIRS
    ][:5]
    args = arguments(trl.KTOConfig, tmp_path, **trl_settings)
    args.per_device_train_batch_size = len(data)
    trainer = trl.KTOTrainer(
        model=policy, ref_model=reference, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
    rows = list(trainer.train_dataset)
    examples = [
        Example(
            i, list(r["prompt_ids"]), (completion(r["completion_ids"]), completion(r["KL_completion_ids"])), 1.0,
            scores=(float(r["label"]),),
        )
        for i, r in enumerate(rows)
    ]  # fmt: skip
    assert_equal(trainer, rows, policy, reference, kind, examples, pack_tokens, settings)


def assert_sft_equals_trl(tmp_path, pack_tokens: int) -> None:
    """Loss to 1e-5 and gradients to 1e-4 relative of TRL's SFTTrainer on prompt-completion data."""
    tokenizer = small_tokenizer()
    policy = tiny(tokenizer, 0)
    data = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]
    trainer = trl.SFTTrainer(
        model=policy, args=arguments(trl.SFTConfig, tmp_path), train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )  # fmt: skip
    rows = list(trainer.train_dataset)
    examples = []
    for i, row in enumerate(rows):
        start = next(t for t, label in enumerate(row["labels"]) if label != -100)
        ids = list(row["input_ids"])
        examples.append(Example(i, ids[:start], (completion(ids[start:]),), 1.0))
    assert_equal(trainer, rows, policy, None, "sft", examples, pack_tokens, {})
