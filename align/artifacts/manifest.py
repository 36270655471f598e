"""What a stage produced: from what, with which settings, versions and hardware."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from align.spec.base import Settings
from align.spec.model import ModelSettings

INDIRECT = ("tokenizers", "numpy")
"""Packages that align does not ask for itself and that can change a result."""


class FileRecord(Settings):
    """One file of a sealed folder."""

    sha256: str
    bytes: NonNegativeInt


class PolicyRecord(Settings):
    """The model of a policy or a reward model: its base, and whether an adapter stands on it."""

    base: str
    """Fingerprint of the stage that trained the base, or its folder, or its Hub name."""
    base_kind: Literal["stage", "path", "hub"]
    revision: str | None = None
    """Hub revision of the base."""
    adapter: bool
    """Whether the artifact holds an adapter of the base, or a base of its own."""
    model: ModelSettings


class Manifest(Settings):
    """`manifest.json` of an artifact."""

    schema_version: Literal[1] = 1
    kind: str
    stage: str
    """The stage's name in the recipe that made it; another recipe may know it by another name."""
    recipe: str
    fingerprint: str
    inputs: dict[str, str] = Field(default_factory=dict)
    """Stage name -> fingerprint of every artifact that this one was made from."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Entry of the recipe's `data` -> its report."""
    settings: dict[str, Any] = Field(default_factory=dict)
    policy: PolicyRecord | None = None
    """None for a stage that makes no policy."""
    reward: PolicyRecord | None = None
    """None for a stage that makes no reward model."""
    seed: int | None = None
    packing: dict[str, str] = Field(default_factory=dict)
    """How log-probabilities were computed: the fields of a `PackingChoice`; empty for a stage that computed none."""
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, float] = Field(default_factory=dict)
    wall_seconds: NonNegativeFloat = 0.0
    peak_memory_bytes: NonNegativeInt = 0
    steps: NonNegativeInt = 0
    created: str = ""
    """Time in UTC, ISO 8601."""
    files: dict[str, FileRecord] = Field(default_factory=dict, exclude=True)
    """Every file of the artifact. Read from the seal, which knows the hash of `manifest.json` too."""

    @property
    def trained(self) -> PolicyRecord | None:
        """The model that the stage trained, whatever it is good for; None for a stage that trained none."""
        return self.policy or self.reward


def library_versions() -> dict[str, str]:
    """Versions of Python, align and every installed package it names, development tools apart. Imports none of them.

    Example:
        >>> library_versions()["python"] == platform.python_version()
        True
    """
    found = {"python": platform.python_version()}
    for name in ("align", *_required(), *INDIRECT):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _required() -> Iterator[str]:
    try:
        lines = requires("align") or []
    except PackageNotFoundError:  # run from a source tree that was never installed
        return
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        if name and name[0] != "align" and "extra == 'dev'" not in line.replace('"', "'"):
            yield name[0]


def hardware() -> dict[str, Any]:
    """Machine, processor, memory and GPUs of this process."""
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    torch = sys.modules.get("torch")  # whoever used a GPU has torch loaded; nobody else should load it for this
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    name = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return name[1] if name else platform.processor()
