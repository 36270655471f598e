"""What `align.load` hands out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from align.artifacts.store import Store
from align.recipe import build_graph, load_recipe
from align.recipe.digest import Digests
from align.recipe.plan import Plan, make_plan
from align.recipe.rules import check_rules
from align.runner.folder import RunFolder
from align.runner.results import Results, run_results
from align.runner.run import RunResult, run_recipe


class Recipe:
    """A checked recipe.

    Args:
        path: The YAML file.
        overrides: `a.b=c`, as `--set` takes them.

    Raises:
        RecipeError: What is wrong, where, and how to mend it.
        DataError: A data file cannot be read.
    """

    def __init__(self, path: str | Path, overrides: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.overrides = tuple(overrides)
        self.loaded = load_recipe(path, overrides)
        self.graph = build_graph(self.loaded, Store().home)
        check_rules(self.graph)

    @property
    def name(self) -> str:
        return self.loaded.recipe.name

    @property
    def stages(self) -> list[str]:
        """Names of the stages, in the order they run."""
        return list(self.graph.nodes)

    def plan(self) -> Plan:
        """What would run, what is reused, and what it takes."""
        store = Store()
        return make_plan(
            self.graph,
            store_find=lambda fingerprint: store.find(fingerprint) is not None,
            resumes_at=store.resumes_at,
            kept_references=store.references.complete,
            digests=Digests(store.home),
        )

    def run(
        self,
        until: str | None = None,
        from_: str | None = None,
        allow_code: bool = False,
        console: Console | None = None,
    ) -> RunResult:
        """Run it; see `align.run`."""
        return run_recipe(self.path, self.overrides, until=until, from_=from_, allow_code=allow_code, console=console)

    def results(self) -> dict[str, Results]:
        """Results of the comparisons of its last run in the current folder, by stage."""
        return run_results(RunFolder.of(self.name))

    def __repr__(self) -> str:
        return f"Recipe({str(self.path)!r}: {' -> '.join(self.stages)})"
