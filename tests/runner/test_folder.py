from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import LaunchError
from align.recipe import build_graph, load_recipe
from align.runner.folder import ROOTS, RunFolder, RunRecord, StageRecord

RECIPE = """
name: demo
model: {base: base, adapter: {kind: lora, rank: 4, alpha: 8}}
data:
  corpus: {generator: film-reviews, part: corpus, rows: 8, format: prompt_completion}
  rows: {path: data/rows.jsonl, format: prompt_completion}
stages:
  base: {kind: pretrain, data: corpus}
  sft: {kind: sft, data: rows}
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder.of("demo", tmp_path)
    made.path.mkdir(parents=True)
    return made


def artifact(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "store" / name
    path.mkdir(parents=True)
    return path


def test_a_link_is_replaced(folder: RunFolder, tmp_path: Path) -> None:
    first, second = artifact(tmp_path, "a"), artifact(tmp_path, "b")
    folder.link("sft", first)
    folder.link("sft", second)
    assert folder.links() == {"sft": second}
    assert [path.name for path in folder.path.iterdir()] == ["sft"]


def test_links_to_nothing_are_not_told(folder: RunFolder, tmp_path: Path) -> None:
    gone = artifact(tmp_path, "a")
    folder.link("sft", gone)
    gone.rmdir()
    assert folder.links() == {}


def test_links_of_another_state_of_the_recipe_are_dropped(folder: RunFolder, tmp_path: Path) -> None:
    old, same = artifact(tmp_path, "old"), artifact(tmp_path, "same")
    for name, target in (("sft", old), ("base", same), ("gone", same)):
        folder.link(name, target)
    folder.drop_links({"base": same, "sft": tmp_path / "store" / "new"})
    assert folder.links() == {"base": same}


def test_only_one_run_at_a_time(folder: RunFolder) -> None:
    code = f"""
from pathlib import Path
from align.runner.folder import RunFolder
with RunFolder(Path({str(folder.path)!r})).lock():
    print("locked", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert folder.is_locked()
        with pytest.raises(LaunchError, match=rf"pid {other.pid}\) is working on this recipe"), folder.lock():
            pass
        other.communicate("\n")
    assert not folder.is_locked()
    with folder.lock():
        assert folder.is_locked()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(LaunchError, match="cannot write here"), RunFolder.of("demo", tmp_path).lock():
        pass


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(LaunchError, match=r"cannot write here[^\n]*\n  fix: start align in a folder"):
        RunFolder.of("demo", tmp_path).lock().__enter__()


def test_the_store_knows_every_run_folder(folder: RunFolder, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for _ in range(2):
        folder.register(home)
    assert [path.resolve() for path in (home / ROOTS).iterdir()] == [folder.path]


def test_the_kept_recipe_makes_the_same_from_where_it_lies(folder: RunFolder, tmp_path: Path) -> None:
    source = tmp_path / "recipes"
    (source / "data").mkdir(parents=True)
    (source / "data" / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (source / "demo.yaml").write_text(RECIPE)
    loaded = load_recipe(source / "demo.yaml", ["stages.sft.train.learning_rate=3e-4"])
    folder.write_recipe(loaded)
    kept = load_recipe(folder.path / "recipe.yaml")
    fingerprints = [
        {name: node.fingerprint for name, node in build_graph(each, tmp_path / "home").nodes.items()}
        for each in (loaded, kept)
    ]
    assert fingerprints[0] == fingerprints[1]
    assert "learning_rate: 0.0003" in (folder.path / "recipe.yaml").read_text()


def test_secrets_stay_names(folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "very-secret")
    (tmp_path / "demo.yaml").write_text(RECIPE.replace("data/rows.jsonl", "'${env:BUCKET}/rows.jsonl'"))
    folder.write_recipe(load_recipe(tmp_path / "demo.yaml"))
    text = (folder.path / "recipe.yaml").read_text()
    assert "${env:BUCKET}/rows.jsonl" in text
    assert "very-secret" not in text


def test_a_log_is_followed_and_then_kept(folder: RunFolder, tmp_path: Path) -> None:
    folder.log_folder.mkdir()
    log = tmp_path / "log.txt"
    log.write_text("first")
    folder.follow_log("sft", log)
    log.write_text("first and last")
    assert folder.log("sft").read_text() == "first and last"
    folder.keep_log("sft", log)
    log.unlink()
    assert folder.log("sft").read_text() == "first and last"


def test_without_room_for_a_copy_the_link_to_the_log_stays(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    folder.log_folder.mkdir()
    log = tmp_path / "log.txt"
    log.write_text("words")
    folder.follow_log("sft", log)
    monkeypatch.setattr("shutil.copyfile", full)
    folder.keep_log("sft", log)
    assert folder.log("sft").read_text() == "words"
    assert [path.name for path in folder.log_folder.iterdir()] == ["sft.txt"]


def test_a_store_that_cannot_be_written(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.raises(LaunchError, match=r"cannot write to the store: [^\n]*\n  fix: set ALIGN_HOME"):
        folder.register(tmp_path / "home")


def test_the_record_comes_back(folder: RunFolder) -> None:
    assert folder.read_record() is None
    record = RunRecord(recipe="demo", path="demo.yaml", pid=1, started=2.0)
    record.stages["sft"] = StageRecord(fingerprint="f" * 64, state="resumed", resumed_from_step=20)
    folder.write_record(record)
    assert folder.read_record() == record
    (folder.path / "status.json").write_text("{")
    assert folder.read_record() is None
