"""What every test shares: one thread, no network, a home of its own, and data sets where a machine has them."""

from __future__ import annotations

import gc
import os
from pathlib import Path

# Before torch is imported: two threads of several processes on few cores are up to a hundred times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: one that is begun last would keep one core busy and leave the others idle."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


def pytest_collection_finish() -> None:
    """What the imports made stays: a collection need not go through it, which takes a third of a second."""
    gc.freeze()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def align_data() -> Path:
    """Folder of real public data sets (variable ALIGN_DATA); tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("ALIGN_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; set ALIGN_DATA to a folder that has them")
    return folder


@pytest.fixture
def align_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ALIGN_HOME, also seen by the processes a test starts."""
    home = tmp_path / "align-home"
    home.mkdir()
    monkeypatch.setenv("ALIGN_HOME", str(home))
    return home


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
