from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from align.artifacts.seal import (
    folder_bytes,
    publish,
    read_seal,
    seal,
    told_when_full,
    verify,
    verify_once,
    write_atomic,
)
from align.errors import ArtifactError
from tests.artifacts.processes import die_before_file_operation, fork, small_disk, wait


def filled(folder: Path) -> Path:
    (folder / "model" / "deep").mkdir(parents=True)
    (folder / "manifest.json").write_text('{"kind": "sft"}')
    (folder / "model" / "weights.safetensors").write_bytes(os.urandom(5000))
    (folder / "model" / "deep" / "empty.txt").write_bytes(b"")
    return folder


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = filled(tmp_path / "sealed")
    seal(folder, {"step": 12})
    return folder


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_sealed_folder_verifies_and_knows_its_files(sealed: Path) -> None:
    verify(sealed)
    found = read_seal(sealed)
    assert found.extra == {"step": 12}
    sizes = {name: record.bytes for name, record in found.files.items()}
    assert sizes == {"manifest.json": 15, "model/weights.safetensors": 5000, "model/deep/empty.txt": 0}


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "first byte": (lambda f: flip(f / "model/weights.safetensors", 0), "model/weights.safetensors is damaged"),
    "last byte": (lambda f: flip(f / "model/weights.safetensors", 4999), "model/weights.safetensors is damaged"),
    "truncated": (lambda f: os.truncate(f / "model/weights.safetensors", 4096), "4096 bytes and should have 5000"),
    "emptied": (lambda f: os.truncate(f / "manifest.json", 0), "manifest.json has 0 bytes"),
    "grown": (lambda f: (f / "model/deep/empty.txt").write_text("x"), "model/deep/empty.txt has 1 bytes"),
    "deleted": (lambda f: (f / "model/weights.safetensors").unlink(), "model/weights.safetensors is missing"),
    "folder deleted": (lambda f: shutil.rmtree(f / "model"), "model/deep/empty.txt is missing"),
    "extra": (lambda f: (f / "model/code.py").write_text(""), "model/code.py does not belong here"),
    "file to link": (
        lambda f: ((f / "manifest.json").rename(f.parent / "m"), (f / "manifest.json").symlink_to(f.parent / "m")),
        "manifest.json is a link",
    ),
    "folder to link": (
        lambda f: ((f / "model").rename(f.parent / "m"), (f / "model").symlink_to(f.parent / "m")),
        "model is a link",
    ),
    "pipe": (lambda f: os.mkfifo(f / "pipe"), "pipe is a link or a special file"),
    "seal deleted": (lambda f: (f / "seal.json").unlink(), "seal.json is missing"),
    "seal emptied": (lambda f: os.truncate(f / "seal.json", 0), "seal.json cannot be read"),
    "seal truncated": (lambda f: os.truncate(f / "seal.json", 100), "seal.json cannot be read"),
    "seal edited": (
        lambda f: (f / "seal.json").write_text((f / "seal.json").read_text().replace('"step": 12', '"step": 13')),
        "seal.json is damaged",
    ),
    "gone": (shutil.rmtree, "there is no such folder"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(sealed: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(sealed)
    with pytest.raises(ArtifactError, match=message) as caught:
        verify(sealed)
    assert caught.value.where == str(sealed)


def test_no_flipped_bit_of_the_seal_passes_for_another_content(sealed: Path) -> None:
    """A flip is either found, or it changed white space and the seal still says the same."""
    original, path = read_seal(sealed), sealed / "seal.json"
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        flip(path, position)
        with contextlib.suppress(ArtifactError):
            assert read_seal(sealed) == original
        path.write_bytes(data)


def test_links_are_not_sealed(tmp_path: Path) -> None:
    folder = filled(tmp_path / "folder")
    (folder / "outside").symlink_to("/etc")
    with pytest.raises(ArtifactError, match="outside is a link"):
        seal(folder)


def test_verify_once_reads_again_only_what_was_touched(sealed: Path) -> None:
    weights = sealed / "model/weights.safetensors"
    verify_once(sealed)
    flip(weights, 7)
    with pytest.raises(ArtifactError, match="weights"):
        verify_once(sealed)
    # Bytes that change behind an unchanged inode, size and time are only found by `verify`: that is what was saved.
    flip(weights, 7)
    verify_once(sealed)
    now = weights.stat()
    flip(weights, 7)
    os.utime(weights, ns=(now.st_atime_ns, now.st_mtime_ns))
    verify_once(sealed)
    with pytest.raises(ArtifactError, match="weights"):
        verify(sealed)


def test_publish_moves_and_keeps_the_umask(tmp_path: Path) -> None:
    temporary, final = filled(tmp_path / "temporary"), tmp_path / "final"
    publish(temporary, final, {"step": 3})
    assert not temporary.exists()
    verify(final)
    assert read_seal(final).extra == {"step": 3}
    umask = os.umask(0)
    os.umask(umask)
    assert (final / "seal.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_publish_refuses_to_replace_a_good_folder(tmp_path: Path) -> None:
    publish(filled(tmp_path / "one"), tmp_path / "final")
    expected = read_seal(tmp_path / "final")
    with pytest.raises(ArtifactError, match="a verified folder of this name"):
        publish(filled(tmp_path / "two"), tmp_path / "final")
    assert read_seal(tmp_path / "final") == expected


def test_publish_replaces_a_damaged_folder(tmp_path: Path) -> None:
    publish(filled(tmp_path / "one"), tmp_path / "final")
    flip(tmp_path / "final/model/weights.safetensors", 99)
    publish(filled(tmp_path / "two"), tmp_path / "final")
    verify(tmp_path / "final")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]


def test_a_crash_at_any_point_of_publish_leaves_all_or_nothing(tmp_path: Path) -> None:
    outcomes = []
    for n in range(200):
        temporary, final = filled(tmp_path / f"{n}.temporary"), tmp_path / f"{n}"

        def work(temporary: Path = temporary, final: Path = final, n: int = n) -> None:
            die_before_file_operation(n)
            publish(temporary, final)

        code = wait(fork(work))
        outcomes.append((code, final.exists()))
        if final.exists():
            verify(final)
        if code == 0:
            break
    codes = [code for code, _ in outcomes]
    assert codes == [9] * (len(codes) - 1) + [0]
    assert len(codes) > 10, "the hook saw the operations"
    assert [done for _, done in outcomes].count(False) > 8
    assert outcomes[-1] == (0, True)


def test_a_crash_while_a_damaged_folder_is_replaced_never_shows_a_mixture(tmp_path: Path) -> None:
    for n in range(200):
        final = tmp_path / f"{n}"
        publish(filled(tmp_path / f"{n}.old"), final)
        flip(final / "model/weights.safetensors", 99)
        old = (final / "seal.json").read_bytes()
        temporary = filled(tmp_path / f"{n}.new")

        def work(temporary: Path = temporary, final: Path = final, n: int = n) -> None:
            die_before_file_operation(n)
            publish(temporary, final)

        code = wait(fork(work))
        if final.exists() and (final / "seal.json").read_bytes() != old:
            verify(final)
        if code == 0:
            verify(final)
            return
    pytest.fail("publish never finished")


def test_a_crash_at_any_point_of_write_atomic_leaves_the_old_or_the_new_text(tmp_path: Path) -> None:
    path, seen = tmp_path / "status.json", set()
    for n in range(50):
        write_atomic(path, "old")

        def work(n: int = n) -> None:
            die_before_file_operation(n)
            write_atomic(path, "new " * 1000)

        code = wait(fork(work))
        seen.add(path.read_text())
        if code == 0:
            break
    assert seen == {"old", "new " * 1000}


def test_readers_of_a_file_that_is_written_all_the_time_see_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    texts = {letter * 20_000 for letter in "ab"}
    write_atomic(path, min(texts))
    writer = fork(lambda: [write_atomic(path, text) for _ in range(100) for text in texts])
    reads = 0
    while os.waitpid(writer, os.WNOHANG) == (0, 0):
        assert path.read_text() in texts
        reads += 1
    assert reads > 10
    assert [each.name for each in tmp_path.iterdir()] == ["status.json"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "128k") as disk:
        yield disk


def test_a_full_disk_is_told_with_the_sizes_and_leaves_the_old_file(tiny_disk: Path) -> None:
    path = tiny_disk / "status.json"
    write_atomic(path, "old")
    with pytest.raises(ArtifactError, match=r"at least 200000 bytes are needed, \d+ are free") as caught:
        write_atomic(path, "x" * 200_000)
    assert caught.value.where == str(path)
    assert "ALIGN_HOME" in (caught.value.fix or "")
    assert path.read_text() == "old"
    assert [each.name for each in tiny_disk.iterdir()] == ["status.json"]


def test_a_disk_that_fills_up_while_a_folder_is_filled_is_told(tiny_disk: Path) -> None:
    folder = tiny_disk / "folder"
    folder.mkdir()
    (folder / "one").write_bytes(b"1" * 65536)
    with pytest.raises(ArtifactError, match="at least 131072 bytes are needed"), told_when_full(folder):
        (folder / "two").write_bytes(b"2" * 131072)


def test_safetensors_without_space_are_told(tiny_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with pytest.raises(ArtifactError, match="no space left on the disk"), told_when_full(tiny_disk):
        save_file({"w": torch.zeros(100_000)}, tiny_disk / "weights.safetensors")


def test_a_file_size_limit_counts_as_a_full_disk(tmp_path: Path) -> None:
    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(ArtifactError, match="no space left"):
            write_atomic(tmp_path / "file", "x" * 2000)

    assert wait(fork(work)) == 0


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), told_when_full(tmp_path):
        (tmp_path / "absent").read_text()


def test_folder_bytes(sealed: Path) -> None:
    assert folder_bytes(sealed) == 5015 + (sealed / "seal.json").stat().st_size
    assert folder_bytes(sealed / "nowhere") == 0
