"""Which policy a cache is of, and when it may go."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.artifacts import reference
from align.artifacts.lock import is_locked, locked
from align.artifacts.manifest import Manifest, PolicyRecord
from align.artifacts.reference import (
    LOCK,
    PolicyKey,
    ReferenceCaches,
    keep_complete,
    tokenizer_digest,
    weights_digest,
)
from align.artifacts.store import Store
from align.errors import ArtifactError
from align.recipe.digest import Digests
from align.spec.model import ModelSettings
from tests.artifacts.processes import fork, wait

KEY = PolicyKey(base="b", quantization="nf4", dtype="float32", adapter="a", tokenizer="t")
BASE, SFT, OTHER = ("1" * 64, "2" * 64, "3" * 64)

# --- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine", reference.ENGINE + 1),
        ("libraries", KEY.libraries | {"transformers": "0"}),
        ("base", "c"),
        ("quantization", "none"),
        ("dtype", "bfloat16"),
        ("adapter", "b"),
        ("adapter", None),
        ("tokenizer", "u"),
    ],
)
def test_every_ingredient_makes_another_folder(field: str, value: object) -> None:
    assert KEY.model_copy(update={field: value}).name != KEY.name


def test_the_ingredients_are_all_there_are() -> None:
    """A new one needs a case above."""
    assert set(PolicyKey.model_fields) == {
        "engine", "libraries", "base", "quantization", "dtype", "adapter", "tokenizer",
    }  # fmt: skip


def test_ingredients_do_not_run_into_each_other() -> None:
    swapped = KEY.model_copy(update={"base": "a", "adapter": "b"})
    assert swapped.name != KEY.name


WEIGHTS = ("model.safetensors", "model-00002-of-00002.safetensors", "config.json", "adapter_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja", "spiece.model")
NEITHER = ("README.md", "training.log")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (*WEIGHTS, *TOKENIZER, *NEITHER):
        (folder / name).write_bytes(name.encode() * 9)
    return folder


def digests_of(folder: Path, home: Path) -> tuple[str, str]:
    digests = Digests(home)
    return weights_digest(folder, digests), tokenizer_digest(folder, digests)


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*WEIGHTS, *TOKENIZER, *NEITHER])
@pytest.mark.parametrize("how", ["changed", "gone", "renamed"])
def test_one_byte_of_a_file_counts_where_it_belongs(name: str, how: str, model: Path, tmp_path: Path) -> None:
    weights, tokenizer = digests_of(model, tmp_path)
    if how == "changed":
        change(model / name)
    elif how == "gone":
        (model / name).unlink()
    else:
        (model / name).rename(model / f"x{name}")
    found = digests_of(model, tmp_path)
    if how != "renamed":
        assert (found[0] != weights) == (name in WEIGHTS)
        assert (found[1] != tokenizer) == (name in TOKENIZER)
    else:
        assert (found != (weights, tokenizer)) == (name not in NEITHER)


def artifact(store: Store, fingerprint: str, *, base: str | None = None, weights: bytes = b"w", when: str = "") -> Path:
    folder = store.temporary(fingerprint)
    part = folder / ("adapter" if base else "model")
    part.mkdir()
    (part / "weights.safetensors").write_bytes(weights)
    (part / "tokenizer.json").write_text("{}")
    record = PolicyRecord(base=base, base_kind="stage", adapter=True, model=ModelSettings(base="b")) if base else None
    manifest = Manifest(kind="sft", stage="s", recipe="r", fingerprint=fingerprint, policy=record, created=when)
    return store.add(manifest, folder).folder


def test_a_sealed_folder_counts_as_what_it_holds(align_home: Path, tmp_path: Path) -> None:
    """No byte is hashed twice, and the same files give the same digest inside an artifact and outside."""
    store = Store()
    sealed = artifact(store, SFT, base=BASE) / "adapter"
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in sealed.iterdir():
        (plain / path.name).write_bytes(path.read_bytes())
    assert digests_of(sealed, tmp_path) == digests_of(plain, tmp_path)
    first = digests_of(sealed, tmp_path)
    store.discard(SFT)
    again = artifact(store, SFT, base=BASE, weights=b"v") / "adapter"
    found = digests_of(again, tmp_path)
    assert (found[0] != first[0], found[1] == first[1]) == (True, True)


def test_a_damaged_artifact_gives_no_key(align_home: Path, tmp_path: Path) -> None:
    folder = artifact(Store(), SFT, base=BASE) / "adapter"
    (folder / "weights.safetensors").write_bytes(b"v")
    with pytest.raises(ArtifactError, match="damaged"):
        weights_digest(folder, Digests(tmp_path))


# --- owners ------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(align_home: Path) -> Store:
    return Store()


@pytest.fixture
def cache(store: Store) -> Path:
    """The rows of an adapter on a base, both of the store."""
    artifact(store, BASE)
    artifact(store, SFT, base=BASE)
    return opened(store, SFT, BASE)


def opened(store: Store, owner: str, *others: str, key: PolicyKey = KEY) -> Path:
    folders = (store.folder(each) for each in (owner, *others))
    folder = store.references.open(key, owner, {each.name: each for each in folders})
    (folder / "rows-1.safetensors").write_bytes(b"x" * 100)
    return folder


def collected(store: Store, *keep: str, **options: bool) -> set[str]:
    return {each.what for each in store.collect(set(keep), **options)}


def test_it_stays_with_its_policy(store: Store, cache: Path) -> None:
    assert collected(store, BASE, SFT) == set()
    assert collected(store, SFT) == set(), "the base is kept for the adapter"
    assert cache.is_dir()
    assert store.references.bytes > 100


def test_it_goes_with_its_policy(store: Store, cache: Path) -> None:
    removed = store.collect({BASE})
    assert {each.what: each.path for each in removed} == {"artifact": store.folder(SFT), "reference": cache}
    assert next(each.bytes for each in removed if each.what == "reference") > 100
    assert not cache.exists()


def test_a_dry_run_tells_the_same_and_removes_nothing(store: Store, cache: Path) -> None:
    assert collected(store, BASE, dry_run=True) == {"artifact", "reference"}
    assert cache.is_dir()


def test_all_go_on_request(store: Store, cache: Path) -> None:
    assert collected(store, SFT, references=True) == {"reference"}
    assert not cache.exists()
    assert store.folder(SFT).is_dir()


@pytest.mark.parametrize("which", [BASE, SFT])
def test_a_policy_that_was_made_again_has_other_rows(which: str, store: Store, cache: Path) -> None:
    """The fingerprint is the same and so are the weights: only who looks at the bits can tell."""
    keep_complete(cache, "asked", 7)
    assert store.references.complete(SFT) == {"asked": 7}
    store.discard(which)
    assert store.references.complete(SFT) == {}
    artifact(store, which, base=None if which == BASE else BASE, when="later")
    assert store.references.complete(SFT) == {}
    assert collected(store, SFT) == {"reference"}


def test_made_again_with_the_same_bits_it_is_taken_up_again(store: Store, cache: Path) -> None:
    keep_complete(cache, "asked", 7)
    store.discard(SFT)
    artifact(store, SFT, base=BASE, when="later")
    assert opened(store, SFT, BASE) == cache
    assert store.references.complete(SFT) == {"asked": 7}
    assert collected(store, SFT) == set()


def test_one_of_two_owners_is_enough(store: Store, cache: Path) -> None:
    artifact(store, OTHER, base=BASE)
    assert opened(store, OTHER, BASE) == cache
    assert collected(store, OTHER) == {"artifact"}
    assert cache.is_dir()
    assert collected(store) == {"artifact", "reference"}


@pytest.mark.parametrize(
    ("name", "other"), [("ENGINE", reference.ENGINE + 1), ("_versions", lambda: KEY.libraries | {"torch": "0"})]
)
def test_another_engine_tells_nothing(
    name: str, other: object, store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_complete(cache, "asked", 7)
    assert store.references.complete(SFT) == {"asked": 7}
    monkeypatch.setattr(reference, name, other)
    assert store.references.complete(SFT) == {}


@pytest.mark.parametrize("what", ["policy.json", "all"])
def test_a_half_removed_cache_goes(what: str, store: Store, cache: Path) -> None:
    (cache / "policy.json").unlink()
    if what == "all":
        (cache / "rows-1.safetensors").unlink()
    assert collected(store, SFT) == {"reference"}
    assert not cache.exists()


def test_one_that_is_being_written_stays(store: Store, cache: Path) -> None:
    def elsewhere() -> None:
        assert collected(Store(), references=True, dry_run=False) == {"artifact"}

    with locked(cache / LOCK, "the same reference log-probs"):
        assert wait(fork(elsewhere)) == 0
    assert cache.is_dir()
    assert not is_locked(cache / LOCK)


def test_a_cache_without_artifacts_to_show_is_not_opened(store: Store) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        opened(store, SFT)
    assert ReferenceCaches(store.home).folders() == []
