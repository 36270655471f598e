"""Garbage collection: what no run folder and no given recipe points to is removed from the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from align.artifacts.store import Removed, Store
from align.recipe import build_graph, load_recipe
from align.runner.folder import ROOTS, RUNS, RunFolder


def collect(
    recipes: Sequence[Path], *, console: Console, references: bool = False, dry_run: bool = False
) -> list[Removed]:
    """Remove artifacts and unfinished stages that nothing needs.

    Run folders are known wherever they are: every run leaves a link in the store. One that was deleted keeps nothing.

    Args:
        recipes: What these make is kept too.
        console: Where to tell what goes.
        references: Remove all reference log-probabilities too; without it only those of policies that go.
        dry_run: Only tell.

    Raises:
        AlignError: A recipe is wrong.
    """
    store, keep = Store(), set[str]()
    for path in recipes:
        keep |= {node.fingerprint for node in build_graph(load_recipe(path), store.home).nodes.values()}
    for folder in _run_folders(store.home):
        keep |= {target.name for target in folder.links().values()}
        record = folder.read_record()
        keep |= {stage.fingerprint for stage in record.stages.values()} if record else set()
    removed = store.collect(keep, references=references, dry_run=dry_run)
    for each in removed:
        console.print(f"{each.what:<9}  {decimal(each.bytes):>9}  {each.path}", highlight=False, soft_wrap=True)
    going = sum(each.bytes for each in removed if each.what == "reference") if dry_run else 0
    if left := store.references.bytes - going:
        console.print(f"{decimal(left)} of reference log-probs stay (--references drops them)", highlight=False)
    verb = "would be freed" if dry_run else "freed"
    console.print(f"{decimal(sum(each.bytes for each in removed))} {verb}", highlight=False)
    return removed


def _run_folders(home: Path) -> Iterator[RunFolder]:
    """Run folders that left a link in the store, and those of the current folder."""
    for parent in (home / ROOTS, Path.cwd() / RUNS):
        if parent.is_dir():
            yield from (RunFolder(path) for path in sorted(parent.iterdir()) if path.is_dir())
