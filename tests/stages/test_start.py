"""Where a stage that starts from somebody's adapter starts."""

from __future__ import annotations

from pathlib import Path

from align.artifacts.store import Store
from align.methods.sft import SFT
from align.spec.job import Job
from align.spec.model import ModelSettings
from align.stages import start

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def begin(folder: Path, adapter: str, revision: str | None) -> start.Start:
    job = Job(
        recipe="r",
        stage="s",
        kind="sft",
        settings={},
        model=ModelSettings(base="someone/model", revision="b" * 40),
        fingerprint="f",
        folder=str(folder),
        work=str(folder / "work"),
        home=str(folder / "home"),
    )
    settings = SFT(data="rows", policy={"adapter": adapter, "revision": revision})
    return start.of_policy(job, settings, Store(folder / "home"))


def test_an_adapter_has_a_revision_of_its_own(tmp_path: Path) -> None:
    found = begin(tmp_path, "someone/adapter", COMMIT)
    assert (found.base, found.base_kind, found.revision) == ("someone/model", "hub", "b" * 40)
    assert (found.adapter, found.adapter_revision) == ("someone/adapter", COMMIT)


def test_an_adapter_in_a_folder_has_none(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    found = begin(tmp_path, "mine", None)
    assert (found.adapter, found.adapter_revision) == (str((tmp_path / "mine").resolve()), None)
