"""Rows on disk: found by their tokens alone, whole or absent, never trusted unseen."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from align.data.chat import Completion, Example
from align.logps import completion_logps, pack_examples
from align.logps.cache import RowCache, completion_token_logps, row_keys
from align.logps.engine import choose_packing
from align.models import RoleModel, load_base
from tests.artifacts.processes import die_before_file_operation, fork, wait
from tests.models.tiny import LORA, randomise

ASKED = b"asked for"[:8] * 2
KEYS = [bytes([i]) * 16 for i in range(5)]


def rows(*which: int) -> dict[bytes, np.ndarray]:
    """A row of i numbers for each i; none of them is round."""
    return {KEYS[i]: np.arange(1, i + 1, dtype=np.float32) / np.float32(-7) for i in which}


def found(cache: RowCache, wanted=KEYS) -> dict[bytes, bytes]:
    return {key: row.tobytes() for key, row, asked in cache.rows(set(wanted)) if asked == ASKED}


def as_bytes(expected: dict[bytes, np.ndarray]) -> dict[bytes, bytes]:
    return {key: row.tobytes() for key, row in expected.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "policy"


# --- keys --------------------------------------------------------------------------------------------------------

PAIR = Example(
    0, [5, 6, 7], (Completion([8, 9], [True, True], False), Completion([9, 200, 300], [True, False, True], True)), 1.0
)


def test_a_row_is_its_tokens_wherever_it_stands() -> None:
    own, other = row_keys(PAIR)
    assert len({own, other}) == 2
    assert {len(own), len(other)} == {16}
    elsewhere = replace(PAIR, row=9, weight=0.5, group=b"g", scores=(1.0, 0.0), margin=2.0)
    assert row_keys(elsewhere) == (own, other)
    assert row_keys(replace(PAIR, completions=PAIR.completions[::-1])) == (other, own)
    assert row_keys(replace(PAIR, completions=PAIR.completions[1:])) == (other,)


@pytest.mark.parametrize(
    ("prompt", "ids", "mask"),
    [
        ([5, 6, 8], [8, 9], [True, True]),
        ([5, 7, 6], [8, 9], [True, True]),
        ([5, 6], [7, 8, 9], [True, True, True]),
        ([5, 6, 7, 8], [9], [True]),
        ([5, 6, 7], [8, 10], [True, True]),
        ([5, 6, 7], [8, 9], [False, True]),
        ([5, 6, 7], [8, 9, 9], [True, True, False]),
        ([5, 6, 7], [8, 9 + 2**32], [True, True]),
    ],
)
def test_any_other_token_or_mask_is_another_row(prompt: list[int], ids: list[int], mask: list[bool]) -> None:
    assert row_keys(Example(0, prompt, (Completion(ids, mask, False),), 1.0))[0] != row_keys(PAIR)[0]


# --- shards ------------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(folder: Path) -> None:
    RowCache(folder).add(rows(0, 1, 4), ASKED)
    RowCache(folder).add(rows(2), ASKED)
    assert found(RowCache(folder)) == as_bytes(rows(0, 1, 2, 4))
    assert found(RowCache(folder), KEYS[1:3]) == as_bytes(rows(1, 2))


def test_only_new_shards_are_read_again(folder: Path) -> None:
    reader, writer = RowCache(folder), RowCache(folder)
    assert found(reader) == {}
    writer.add(rows(1), ASKED)
    assert found(reader) == as_bytes(rows(1))
    writer.add(rows(2), ASKED)
    assert found(reader) == as_bytes(rows(2))
    assert found(writer) == {}, "a writer knows its own"


def test_reading_makes_nothing(folder: Path) -> None:
    assert found(RowCache(folder)) == {}
    assert not folder.exists()


def shard(folder: Path) -> Path:
    (path,) = folder.glob("rows-*.safetensors")
    return path


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def without(path: Path, tensor: str) -> None:
    """A whole shard under its right name, as a version of align would have written it that knew less."""
    tensors = safetensors.numpy.load(path.read_bytes())
    content = safetensors.numpy.save({name: value for name, value in tensors.items() if name != tensor})
    path.unlink()
    path.with_name(RowCache(path.parent)._name(content)).write_bytes(content)


DAMAGE = {
    "first byte": lambda path: flip(path, 0),
    "a name": lambda path: flip(path, 12),
    "a number": lambda path: flip(path, -3),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "nothing": lambda path: path.write_bytes(b""),
    "more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another version": lambda path: without(path, "asked"),
    "another name": lambda path: path.rename(path.with_name(f"rows-{'0' * 32}.safetensors")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_told_removed_and_passed_over(kind: str, folder: Path, caplog) -> None:
    RowCache(folder).add(rows(1, 2), ASKED)
    DAMAGE[kind](shard(folder))
    RowCache(folder).add(rows(3), ASKED)
    assert found(RowCache(folder)) == as_bytes(rows(3))
    assert "is damaged" in caplog.text
    assert "computed again" in caplog.text
    assert len(list(folder.glob("rows-*"))) == 1
    RowCache(folder).add(rows(1, 2), ASKED)
    assert found(RowCache(folder)) == as_bytes(rows(1, 2, 3))


def test_a_shard_of_another_policy_does_not_count(folder: Path, caplog) -> None:
    RowCache(folder).add(rows(1, 2), ASKED)
    shutil.copytree(folder, folder.with_name("other"))
    assert found(RowCache(folder.with_name("other"))) == {}
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("moment", range(8))
def test_a_writer_that_dies_leaves_all_or_nothing(moment: int, folder: Path, caplog) -> None:
    RowCache(folder).add(rows(1), ASKED)

    def write() -> None:
        cache = RowCache(folder)
        die_before_file_operation(moment)
        cache.add(rows(2, 3), ASKED)

    code = wait(fork(write))
    assert code in (0, 9)
    assert found(RowCache(folder)) in (as_bytes(rows(1)), as_bytes(rows(1, 2, 3)))
    assert caplog.text == ""
    RowCache(folder).tidy()
    assert all(path.name.startswith("rows-") for path in folder.iterdir())
    RowCache(folder).add(rows(2, 3), ASKED)
    assert found(RowCache(folder)) == as_bytes(rows(1, 2, 3))


def test_dying_is_tried_before_and_after_the_rename(folder: Path) -> None:
    """The cases above reach from before the first byte to after the last."""
    folder.mkdir()

    def write() -> None:
        cache = RowCache(folder)
        die_before_file_operation(7)
        cache.add(rows(2, 3), ASKED)

    assert wait(fork(write)) == 0


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["llama", "qwen2"])
@pytest.mark.parametrize("wanted", ["rows", "flat", "shared"])
def test_values_are_those_of_the_plain_model_token_by_token(make: str, wanted: str, folders: dict[str, Path]) -> None:
    roles = RoleModel(load_base(folders[make]))
    roles.add_adapter("reference", settings=LORA, trainable=False)
    randomise(roles, "reference", seed=1)
    g = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(4, 300, (n,), generator=g).tolist()  # noqa: E731
    examples = [
        Example(
            i,
            ids(p),
            tuple(Completion(ids(n), [(t + n) % 3 > 0 for t in range(n)], False) for n in lengths),
            1.0,
        )
        for i, (p, lengths) in enumerate([(5, (3, 7)), (1, (1, 2, 9)), (8, (4,)), (5, (1,))])
    ]
    with torch.no_grad(), roles.role("reference"):
        packing = choose_packing(roles.causal_lm, dropout=False, wanted=wanted)
    assert packing == wanted
    seen = 0
    for pack in pack_examples(examples, 24, packing=packing):
        made = iter(completion_token_logps(roles, "reference", pack))
        for i in pack.examples:
            for completion in examples[i].completions:
                tokens = torch.tensor([examples[i].prompt_ids + completion.ids])
                with torch.no_grad(), roles.role("reference"):
                    plain = roles.base(input_ids=tokens).logits.float().log_softmax(-1)[0, :-1]
                start = len(examples[i].prompt_ids)
                at = [start + t for t, on in enumerate(completion.mask) if on]
                expected = torch.stack([plain[t - 1, tokens[0, t]] for t in at]) if at else torch.zeros(0)
                row = next(made)
                assert row.dtype == np.float32
                torch.testing.assert_close(torch.tensor(row), expected, atol=1e-4, rtol=1e-5)
                seen += 1
        assert next(made, None) is None
    assert seen == 7


def test_rows_sum_to_what_the_step_sums(folders: dict[str, Path]) -> None:
    roles = RoleModel(load_base(folders["llama"]))
    roles.add_base_role("reference")
    totals = completion_logps(roles, "reference", [PAIR], 100)
    (pack,) = pack_examples([PAIR], 100)
    assert [row.sum() for row in completion_token_logps(roles, "reference", pack)] == pytest.approx(totals[0], rel=1e-6)
