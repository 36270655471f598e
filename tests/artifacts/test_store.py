from __future__ import annotations

import json
import logging
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from align.artifacts.lock import is_locked
from align.artifacts.manifest import Manifest, PolicyRecord, hardware, library_versions
from align.artifacts.seal import verify
from align.artifacts.store import Store
from align.errors import ArtifactError, LaunchError
from align.spec.model import ModelSettings
from tests.artifacts.processes import die_before_file_operation, fork, wait


def fingerprint(digit: str) -> str:
    return digit * 64


A, B, C, D = map(fingerprint, "abcd")


@pytest.fixture
def store(align_home: Path) -> Store:
    return Store()


def manifest(of: str, base: str | None = None) -> Manifest:
    policy = None
    if base is not None:
        policy = PolicyRecord(base=base, base_kind="stage", adapter=True, model=ModelSettings(base="base"))
    return Manifest(kind="sft", stage="sft", recipe="r", fingerprint=of, policy=policy, metrics={"loss": 0.5})


def made(store: Store, of: str, base: str | None = None, weights: bytes = b"weights" * 100) -> Path:
    folder = store.temporary(of)
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(weights)
    return store.add(manifest(of, base), folder).folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# --- where it is -------------------------------------------------------------------------------------------------


def test_home_is_the_variable_or_the_argument_or_in_the_users_home(
    align_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Store().home == align_home
    assert Store(tmp_path / "other").home == tmp_path / "other"
    monkeypatch.delenv("ALIGN_HOME")
    assert Store().home == Path.home() / ".align"


def test_looking_touches_nothing(store: Store) -> None:
    assert store.find(A) is None
    assert store.collect(set()) == []
    assert names(store.home) == []


@pytest.mark.parametrize("bad", ["", "../../etc", "a/b", ".", "a b"])
def test_a_name_cannot_leave_the_store(store: Store, bad: str) -> None:
    for use in (store.find, store.get, store.work, store.temporary, store.discard):
        with pytest.raises(ArtifactError, match="not a fingerprint"):
            use(bad)


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"cannot write to .*file(.|\n)*set ALIGN_HOME") as caught:
        Store(tmp_path / "file").work(A)
    assert caught.value.exit_code == 4


# --- add, find, get ----------------------------------------------------------------------------------------------


def test_what_is_added_is_found(store: Store) -> None:
    folder = made(store, A)
    found = store.find(A)
    assert found is not None
    assert found == store.get(A)
    assert found.folder == folder
    assert found.manifest.metrics == {"loss": 0.5}
    assert set(found.manifest.files) == {"manifest.json", "model/model.safetensors"}
    assert found.manifest.files["model/model.safetensors"].bytes == 700
    assert "files" not in json.loads((folder / "manifest.json").read_text())
    assert names(store.home / "artifacts") == [A[:16]]
    assert store.find(B) is None
    with pytest.raises(ArtifactError, match="no such artifact") as caught:
        store.get(B)
    assert "run the recipe again" in (caught.value.fix or "")


@pytest.mark.parametrize("file", ["model/model.safetensors", "manifest.json", "seal.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_a_damaged_artifact_is_moved_aside_with_a_warning_and_made_again(
    store: Store, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    path = made(store, A) / file
    data = path.read_bytes()
    changed = {"flip": bytes([data[0] ^ 1]) + data[1:], "truncate": data[:-5], "empty": b"", "delete": b""}
    path.write_bytes(changed[damage])
    if damage == "delete":
        path.unlink()
    with pytest.raises(ArtifactError, match=path.name):
        store.get(A)
    with caplog.at_level(logging.WARNING):
        assert Store().find(A) is None
    assert path.name in caplog.text
    assert names(store.home / "artifacts") == []
    assert [name[:16] for name in names(store.home / "damaged")] == [A[:16]]
    made(store, A)
    assert store.find(A) is not None


def test_an_extra_file_is_damage(store: Store) -> None:
    (made(store, A) / "model" / "modeling_custom.py").write_text("print('hello')")
    assert store.find(A) is None


def test_another_fingerprint_with_the_same_first_digits_is_not_taken(store: Store) -> None:
    made(store, A)
    other = A[:16] + "b" * 48
    with pytest.raises(ArtifactError, match="another fingerprint"):
        store.get(other)


def test_a_manifest_of_another_version_is_not_taken(store: Store) -> None:
    from align.artifacts.seal import seal

    folder = made(store, A)
    text = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(text | {"schema_version": 2}))
    seal(folder)
    with pytest.raises(ArtifactError, match="schema_version"):
        store.get(A)


def test_a_failed_add_leaves_no_temporary_folder(store: Store) -> None:
    folder = store.temporary(A)
    (folder / "link").symlink_to("/etc")
    with pytest.raises(ArtifactError, match="link"):
        store.add(manifest(A), folder)
    assert names(store.home / "artifacts") == []


def test_a_crash_at_any_point_of_add_leaves_no_half_artifact(store: Store) -> None:
    for n in range(200):
        of = f"{n:016d}"

        def work(of: str = of, n: int = n) -> None:
            die_before_file_operation(n)
            made(store, of)

        code = wait(fork(work))
        folder = store.home / "artifacts" / of
        if folder.exists():
            verify(folder)
        if code == 0:
            assert n > 15
            break
        found = store.find(of)
        assert (found is None) == (not folder.exists())
    assert names(store.home / "damaged") == []
    assert all(removed.what == "temporary" for removed in store.collect({f"{i:016d}" for i in range(n + 1)}))
    assert not [name for name in names(store.home / "artifacts") if name.startswith(".")]


def test_processes_that_add_the_same_artifact_at_once_agree_on_one(store: Store, tmp_path: Path) -> None:
    for round_ in range(5):
        of = fingerprint(str(round_))
        start = tmp_path / f"start{round_}"

        def work(i: int, of: str = of, start: Path = start) -> None:
            folder = store.temporary(of)
            (folder / "weights").write_text(f"process {i}" * 1000)
            (tmp_path / f"ready{of[0]}{i}").write_text("")
            while not start.exists():
                time.sleep(0.0005)
            found = store.add(manifest(of), folder)
            (tmp_path / f"saw{of[0]}{i}").write_text(found.manifest.files["weights"].sha256)

        children = [fork(lambda i=i: work(i)) for i in range(3)]
        while len(list(tmp_path.glob(f"ready{of[0]}*"))) < 3:
            time.sleep(0.001)
        start.write_text("")
        assert [wait(pid) for pid in children] == [0, 0, 0]
        seen = {path.read_text() for path in tmp_path.glob(f"saw{of[0]}*")}
        found = store.find(of)
        assert found is not None
        assert seen == {found.manifest.files["weights"].sha256}
    assert names(store.home / "artifacts") == [str(i) * 16 for i in range(5)]


# --- locks -------------------------------------------------------------------------------------------------------


def test_a_lock_names_its_holder_and_ends_with_it(store: Store, tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def hold() -> None:
        with store.lock(A, "dpo"):
            ready.write_text("")
            time.sleep(60)

    child = fork(hold)
    while not ready.exists():
        time.sleep(0.001)
    with (
        pytest.raises(LaunchError, match=rf"another `align run` \(pid {child}\) is working on stage dpo") as caught,
        store.lock(A),
    ):
        pytest.fail("two holders")
    assert caught.value.exit_code == 4
    assert is_locked(store.work(A) / "stage.lock")
    with store.lock(B):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not is_locked(store.work(A) / "stage.lock")
    with store.lock(A):
        pass


def test_a_holder_on_another_host_is_told(store: Store) -> None:
    with store.lock(A, "sft"):
        (store.work(A) / "stage.lock").write_text("77 far-away stage sft\n")
        with pytest.raises(LaunchError, match="pid 77 on far-away"), store.lock(A):
            pass
    assert socket.gethostname() != "far-away"


def test_only_one_of_many_processes_is_inside_at_a_time(store: Store, tmp_path: Path) -> None:
    """Also while each holder removes the work folder, lock file and all, before it lets go."""
    inside = tmp_path / "inside"

    def work() -> None:
        done = 0
        while done < 15:
            try:
                with store.lock(A):
                    inside.mkdir()  # fails if somebody is inside
                    inside.rmdir()
                    gone = tmp_path / f"{os.getpid()}-{done}"
                    (store.home / "work" / A[:16]).rename(gone)
                    done += 1
            except LaunchError:
                continue

    assert [wait(pid) for pid in [fork(work) for _ in range(3)]] == [0, 0, 0]


def test_discard_forgets_a_stage_but_not_its_lock(store: Store) -> None:
    made(store, A)
    work = store.work(A)
    (work / "checkpoints" / "step-000010").mkdir(parents=True)
    (work / "metrics.jsonl").write_text("{}")
    with store.lock(A):
        store.discard(A)
        assert store.find(A) is None
        assert names(work) == ["stage.lock"]
        with pytest.raises(LaunchError), store.lock(A):
            pass


# --- garbage collection ------------------------------------------------------------------------------------------


def test_collect_removes_what_nobody_keeps(store: Store) -> None:
    made(store, A)
    made(store, B, base=A)
    made(store, C)
    store.work(D).joinpath("log.txt").write_text("log")
    assert store.collect({B, D}, dry_run=True)[0].path.exists()
    removed = store.collect({B, D})
    assert [(each.what, each.path.name) for each in removed] == [("artifact", C[:16])]
    assert removed[0].bytes > 700
    assert names(store.home / "artifacts") == [A[:16], B[:16]], "the base of a kept adapter is kept"
    assert store.work(D).joinpath("log.txt").exists()
    assert [each.what for each in store.collect(set())] == ["artifact", "artifact", "work"]
    assert names(store.home / "artifacts") == names(store.home / "work") == []


def test_collect_takes_artifact_names_for_fingerprints(store: Store) -> None:
    made(store, A)
    assert store.collect({A[:16]}) == []


def test_collect_keeps_what_is_locked_and_what_it_reads(store: Store, tmp_path: Path) -> None:
    made(store, A)
    made(store, B, base=A)
    made(store, D)
    work, ready = store.work(C), tmp_path / "ready"
    (work / "job.json").write_text(json.dumps({"inputs": {"sft": B}}))

    def hold() -> None:
        with store.lock(C):
            store.temporary(C)
            ready.write_text("")
            time.sleep(60)

    child = fork(hold)
    while not ready.exists():
        time.sleep(0.001)
    try:
        assert [each.path.name for each in store.collect(set())] == [D[:16]]
        assert names(work) == ["job.json", "stage.lock"]
        assert len(names(store.home / "artifacts")) == 3, "A, B and the unfinished C"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert sorted(each.what for each in store.collect(set())) == ["artifact", "artifact", "temporary", "work"]


def test_collect_empties_what_was_set_aside(store: Store) -> None:
    os.truncate(made(store, A) / "manifest.json", 0)
    assert store.find(A) is None
    assert [each.what for each in store.collect({A})] == ["damaged"]
    assert names(store.home / "damaged") == []


def test_a_crash_while_collecting_leaves_whole_artifacts_and_is_swept_up(store: Store) -> None:
    for n in range(300):
        made(store, A)

        def work(n: int = n) -> None:
            die_before_file_operation(n)
            store.collect(set())

        code = wait(fork(work))
        if (store.home / "artifacts" / A[:16]).exists():
            verify(store.home / "artifacts" / A[:16])
        store.collect(set())
        assert names(store.home / "artifacts") == names(store.home / "work") == []
        if code == 0:
            return
    pytest.fail("collect never finished")


# --- what a manifest tells ---------------------------------------------------------------------------------------


def test_versions_cover_what_the_project_uses_and_no_tools() -> None:
    found = library_versions()
    assert {"python", "align", "torch", "transformers", "tokenizers", "peft", "bitsandbytes", "numpy"} <= set(found)
    assert not {"ruff", "mypy", "pytest"} & set(found)


def test_hardware_is_json() -> None:
    found = json.loads(json.dumps(hardware()))
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**30
    assert found["processor"]


def test_reading_artifacts_loads_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, align.artifacts.seal; from align.artifacts.manifest import library_versions, hardware;"
        "library_versions(); hardware(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
