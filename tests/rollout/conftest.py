"""A tokenizer and tiny policies, written once for all tests of rollouts."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from align.models import RoleModel, new_base, prepare_process, train_tokenizer
from align.spec.model import Architecture, LoraSettings, TokenizerSettings
from tests.models.conftest import folders
from tests.models.tiny import randomise

__all__ = ["folders"]

TEXTS = ["The film was slow but the cast saved it.", "I loved every minute of this western!"] * 20


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    prepare_process()
    return train_tokenizer(TEXTS, TokenizerSettings(vocab_size=320))


@pytest.fixture(scope="session")
def roles(tokenizer: PreTrainedTokenizerBase) -> RoleModel:
    """Two policies of one base whose heads are scaled up, so that their distributions are far from uniform."""
    base = new_base(Architecture(hidden_size=64, intermediate_size=128, layers=2), tokenizer, seed=0)
    base.model.norm.weight.data.mul_(6)
    roles = RoleModel(base)
    roles.add_adapter("policy", settings=LoraSettings(rank=8), trainable=True)
    randomise(roles, "policy", seed=1)
    roles.add_base_role("base")
    return roles


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (24,), generator=generator).tolist()
    return [torch.randint(3, 270, (n,), generator=generator).tolist() for n in lengths]
