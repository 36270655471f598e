"""Runs a recipe: every stage in order, reused, resumed or started, then the tables and the report."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from align.artifacts.store import Artifact, Store
from align.errors import AlignError, LaunchError, RecipeError
from align.recipe import Graph, LoadedRecipe, Node, build_graph, load_recipe
from align.recipe.references import references
from align.recipe.rules import check_rules
from align.recipe.suggest import did_you_mean
from align.report.page import write_report
from align.runner.folder import RunFolder, RunRecord, StageRecord
from align.runner.job import make_job
from align.runner.launch import RESTART, RESUME, Preempted, Worker, again_of
from align.runner.progress import MetricsTail, StageProgress, clock
from align.runner.results import keep_results, run_results, show_results
from align.spec.base import CodeRef
from align.spec.stages import engine_of

POLL_SECONDS = 0.2
AGAIN, AGAIN_FORCED = "run the same command again", "run it again without --from"
"""With `--from` the same command would make again what has been made by now."""
TRACKERS = {"wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}
"""What `logging.report_to` may name -> the packages that do for it."""


@dataclass(frozen=True)
class StageResult:
    """What became of one stage.

    Attributes:
        state: `reused` from the store, `resumed` from a checkpoint, or `done` from its start.
        seconds: Wall time in this run.
        artifact: Folder of what it made.
        resumed_from_step: The checkpoint's step; 0 unless resumed.
    """

    state: Literal["reused", "resumed", "done"]
    seconds: float
    artifact: Path
    resumed_from_step: int = 0


@dataclass(frozen=True)
class RunResult:
    """A finished run: its stages in order and its folder, which holds the report and the links to the artifacts."""

    stages: dict[str, StageResult] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def results(self) -> dict[str, dict[str, Any]]:
        """Content of `results.json` of every comparison of the run, by stage."""
        return run_results(RunFolder(self.folder))


def run_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    until: str | None = None,
    from_: str | None = None,
    allow_code: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Run the stages of a recipe that are not in the store yet.

    Args:
        path: The recipe.
        overrides: `a.b=c`, as `--set` takes them.
        until: Stop after this stage.
        from_: Make this stage and all that follow from it again, even where the store has them.
        allow_code: Whether functions of the user's that the recipe names may run.
        console: Where progress and tables go.

    Returns:
        What became of every stage, and the run folder.

    Raises:
        AlignError: Of the kind that ended the run; its `exit_code` is the command's.
    """
    console = console or Console()
    loaded = load_recipe(path, overrides)
    store = Store()
    graph = build_graph(loaded, store.home)
    check_rules(graph)
    _reachable(graph)
    _trackers(loaded)
    _engines(graph, store)
    nodes = _selected(graph, until)
    again = _forced(graph, nodes, from_)
    if not allow_code:
        _no_code(graph, [node for node in nodes if node in again or not store.folder(node.fingerprint).exists()])
    folder = RunFolder.of(loaded.recipe.name)
    with folder.lock():
        folder.register(store.home)
        folder.write_recipe(loaded)
        folder.drop_links(keep={name: store.folder(node.fingerprint).resolve() for name, node in graph.nodes.items()})
        run = _Run(loaded, graph, store, folder, console, nodes)
        try:
            run.discard(again)
            results = {node.name: run.stage(node) for node in nodes}
        except AlignError as error:
            if from_ is not None and error.fix in (RESUME, RESTART):
                error.fix = error.fix.replace(AGAIN, AGAIN_FORCED)
            with suppress(AlignError):  # the page tells how far it came; its own trouble is not the one to tell
                write_report(folder.path, folder.report)
            raise
        _finish(folder, console)
    return RunResult(results, folder.path)


def _reachable(graph: Graph) -> None:
    if graph.unresolved:
        names = ", ".join(f"{name} ({reason})" for name, reason in graph.unresolved.items())
        raise LaunchError(
            f"neither the Hub nor the local cache could be asked for {names}",
            where=str(graph.loaded.path),
            fix="connect to the network, or download it before: hf download NAME",
        )


def _trackers(loaded: LoadedRecipe) -> None:
    """A tracker that is not installed stops the run before anything else; its first worker would tell it late."""
    for i, name in enumerate(loaded.recipe.logging.report_to):
        # wandb writes into a folder `wandb`, which looks like a package without a file.
        found = [spec for package in TRACKERS[name] if (spec := find_spec(package)) and spec.origin]
        if not found:
            raise LaunchError(
                f"the recipe reports to {name}, and the package {name} is not installed",
                where=loaded.where("logging", "report_to", i),
                fix=f"pip install {name}, or take it out of logging.report_to",
            )


def _engines(graph: Graph, store: Store) -> None:
    """The same for TRL, where a stage that is still to run asks for it."""
    for node in graph.nodes.values():
        if engine_of(node.stage) == "trl" and not store.folder(node.fingerprint).exists() and not find_spec("trl"):
            raise LaunchError(
                f"stage `{node.name}` has engine trl, and the package trl is not installed",
                where=graph.loaded.where("stages", node.name, "engine"),
                fix="pip install 'align[trl]', or write engine: align",
            )


def _no_code(graph: Graph, nodes: list[Node]) -> None:
    """Python files run only where the user says so: a recipe from elsewhere must not bring its code along unseen."""
    for node in nodes:
        for each in references(node.stage):
            if isinstance(each.mark, CodeRef):
                raise LaunchError(
                    f"stage `{node.name}` runs code of its own, {each.name}",
                    where=graph.loaded.where("stages", node.name, *each.loc),
                    fix="read it, then run with --allow-code",
                )


def _selected(graph: Graph, until: str | None) -> list[Node]:
    if until is None:
        return list(graph.nodes.values())
    _known(graph, until, "--until")
    return list(graph.upto(until).nodes.values())


def _forced(graph: Graph, nodes: list[Node], from_: str | None) -> list[Node]:
    if from_ is None:
        return []
    _known(graph, from_, "--from")
    if from_ not in {node.name for node in nodes}:
        raise RecipeError(
            f"stage `{from_}` does not run here: it is no input of the stage that --until names",
            where="--from",
            fix="leave out --until, or name a later stage in it",
        )
    return [node for node in nodes if node.name == from_ or node.name in graph.descendants(from_)]


def _known(graph: Graph, name: str, option: str) -> None:
    if name not in graph.nodes:
        raise RecipeError(
            f"the recipe has no stage `{name}`{did_you_mean(name, graph.nodes)}",
            where=option,
            fix=f"one of: {', '.join(graph.nodes)}",
        )


class _Run:
    """One run in progress: walks the stages and keeps the run folder's record."""

    def __init__(
        self, loaded: LoadedRecipe, graph: Graph, store: Store, folder: RunFolder, console: Console, nodes: list[Node]
    ) -> None:
        self.loaded, self.graph, self.store, self.folder, self.console = loaded, graph, store, folder, console
        self.received: signal.Signals | None = None
        self.width = max(len(node.name) for node in nodes)
        self.record = RunRecord(
            recipe=loaded.recipe.name,
            path=str(loaded.path),
            pid=os.getpid(),
            started=time.time(),
            stages={node.name: StageRecord(fingerprint=node.fingerprint) for node in nodes},
        )
        folder.write_record(self.record)

    def discard(self, nodes: list[Node]) -> None:
        """Forget what the store has of these stages, finished or not."""
        for node in nodes:
            with self.store.lock(node.fingerprint, node.name):
                self.store.discard(node.fingerprint)

    def stage(self, node: Node) -> StageResult:
        """Reuse, resume or run one stage."""
        start = time.monotonic()
        artifact, resumed = self.store.find(node.fingerprint), 0
        state: Literal["reused", "resumed", "done"] = "reused"
        if artifact is None:
            with self.store.lock(node.fingerprint, node.name):
                artifact = self.store.find(node.fingerprint)  # a run elsewhere may have just finished it
                if artifact is None:
                    artifact, resumed = self.execute(node, start)
                    state = "resumed" if resumed else "done"
        self.folder.link(node.name, artifact.folder)
        result = StageResult(state, time.monotonic() - start, artifact.folder, resumed)
        self.note(node, state=state, seconds=result.seconds, resumed_from_step=resumed, message="")
        self.console.print(self.line(node, result), highlight=False, markup=False, soft_wrap=True)
        if self.received is not None:
            raise Preempted(f"stopped by {self.received.name} after stage {node.name} was finished", fix=RESUME)
        return result

    def execute(self, node: Node, start: float) -> tuple[Artifact, int]:
        """Run the worker of a stage to its end; the artifact, and the step it resumed from."""
        job = make_job(self.graph, node, home=self.store.home, work=self.store.work(node.fingerprint))
        self.note(node, state="running", work=job.work)
        try:
            worker = Worker(job)
            with worker.signals(), worker, StageProgress(self.console, f"{node.name:<{self.width}}") as progress:
                self.folder.follow_log(node.name, worker.log)
                metrics = MetricsTail(worker.work / "metrics.jsonl")
                while not worker.wait(POLL_SECONDS):
                    progress.update(worker.status, metrics.read())
                    if worker.received is not None:
                        saving = "saving and stopping" if again_of(job) == RESUME else "stopping, and nothing is kept"
                        progress.tell(f"{worker.received.name}: {saving}; once more ends it at once")
            self.folder.keep_log(node.name, worker.log)
            worker.check(self.folder.log(node.name))
            artifact = self.store.get(node.fingerprint)
        except AlignError as error:
            state = "preempted" if isinstance(error, Preempted) else "failed"
            with suppress(AlignError):  # a full disk, of which the worker told already
                self.note(node, state=state, seconds=time.monotonic() - start, message=str(error))
            raise
        status, self.received = worker.status, worker.received
        return artifact, status.resumed_from_step if status else 0

    def note(self, node: Node, **changes: Any) -> None:
        stages = self.record.stages
        stages[node.name] = stages[node.name].model_copy(update=changes)
        self.folder.write_record(self.record)

    def line(self, node: Node, result: StageResult) -> str:
        how = f"resumed at step {result.resumed_from_step}" if result.state == "resumed" else result.state
        return f"  {node.name:<{self.width}}  {how}  {clock(result.seconds)}"


def _finish(folder: RunFolder, console: Console) -> None:
    """Write the report, then end with the tables and where the report is."""
    keep_results(folder)
    report = write_report(folder.path, folder.report)
    show_results(folder, console)
    shown = report.relative_to(Path.cwd()) if report.is_relative_to(Path.cwd()) else report
    console.print(f"report: {shown}", highlight=False, markup=False, soft_wrap=True)
