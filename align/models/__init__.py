"""Bases, adapters and heads: one frozen model in memory, and the roles it plays."""

from align.models.base import load_base, new_base
from align.models.platform import compute_dtype, device, prepare_process
from align.models.roles import RoleModel
from align.models.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "RoleModel",
    "compute_dtype",
    "device",
    "load_base",
    "load_tokenizer",
    "new_base",
    "prepare_process",
    "train_tokenizer",
]
