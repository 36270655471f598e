from __future__ import annotations

from pathlib import Path

from align.artifacts.chunks import Chunks, count_chunks
from align.artifacts.store import Store


def test_what_was_added_is_there_and_is_counted_unread(tmp_path: Path) -> None:
    chunks = Chunks(tmp_path)
    assert (chunks.read(), count_chunks(tmp_path)) == ({}, 0)
    chunks.add({"sft/1": [{"text": "쉽다\u2028\n"}], "sft/2": []})
    Chunks(tmp_path).add({"sft/3": [1]})
    assert chunks.read() == {"sft/1": [{"text": "쉽다\u2028\n"}], "sft/2": [], "sft/3": [1]}
    assert count_chunks(tmp_path) == 3
    (tmp_path / "chunks" / ".000001-half.jsonl.tmp").write_text("{")
    assert len(chunks.read()) == 3
    chunks.drop()
    assert chunks.read() == {}


def test_a_stage_goes_on_behind_its_parts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fingerprint = "f" * 64
    assert store.resumes_at(fingerprint) is None
    Chunks(store.work(fingerprint)).add({"a": 1, "b": 2})
    assert store.resumes_at(fingerprint) == 2
