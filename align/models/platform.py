"""What a process must settle before it loads a model: threads, device, dtype, and two libraries' CPU defaults."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Literal

import torch

from align.errors import LaunchError


@cache
def prepare_process() -> None:
    """Settle threads, environment and determinism. Idempotent; every worker and test calls it first.

    Without a GPU every operation is made deterministic, so that a seeded run can be repeated bit for bit.
    """
    from transformers.utils.logging import disable_progress_bar

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()  # worker output goes to a file
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels it does without, layer by layer
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one machine share its cores: more threads than cores are up to a hundred times slower.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.use_deterministic_algorithms(True)
        # It would fill every new buffer with NaN, which only helps debugging.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype(setting: Literal["auto", "float32", "bfloat16"]) -> torch.dtype:
    """The dtype of activations and of weights that are not quantised."""
    if setting == "auto":
        setting = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return torch.float32 if setting == "float32" else torch.bfloat16


@cache
def prepare_bitsandbytes() -> None:
    """Import bitsandbytes (about 4 s) with its in-place CPU repack switched off.

    On a CPU with AVX512-BF16 the first forward pass in eval mode rewrites every 4-bit weight for a kernel without a
    backward pass. Training after it has wrong or missing gradients and no error says so. The switch is read when a
    layer is made, so this has to run before a quantised model is loaded.
    """
    try:
        import bitsandbytes.nn.modules as modules
    except ImportError as error:
        raise LaunchError(f"bitsandbytes cannot be imported: {error}", fix="pip install bitsandbytes") from error
    modules.has_avx512bf16 = lambda: False
