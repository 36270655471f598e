"""Candidates, scores, selections and what is trained on them, through the command line; killed, stopped and shared."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import Cli
from tests.e2e.test_spine import copy_of, ran

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

RECIPE = Path(__file__).with_name("records.yaml")
MADE = ("drawn", "scored", "pairs", "best")
TRAINED = ("dpo", "rft", "rrhf")
PROMPTS = 48


def digest(cli: Cli, stage: str) -> str:
    return hashlib.sha256((cli.stage(stage, "records") / "records.jsonl").read_bytes()).hexdigest()


def records(cli: Cli, stage: str) -> list[dict[str, Any]]:
    lines = (cli.stage(stage, "records") / "records.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def forget(cli: Cli, *stages: str) -> None:
    """Take stages out of the store, as if they had not run."""
    for stage in stages:
        (cli.stage(stage, "records").resolve() / "manifest.json").unlink()  # damaged: it is made again


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory) -> Cli:
    """One undisturbed run."""
    cli = copy_of(tiny_run, tmp_path_factory.mktemp("records") / "run")
    cli.output = cli("run", str(RECIPE), timeout=600)
    return cli


def copied(whole: Cli, folder: Path) -> Cli:
    cli = copy_of(whole, folder)
    for link in (folder / "runs" / "records").iterdir():
        if link.is_symlink():
            name = link.readlink().name
            link.unlink()
            link.symlink_to(folder / "home" / "artifacts" / name)
    return cli


def test_records_are_made_read_and_kept(whole: Cli) -> None:
    assert [ran(whole.output, stage) for stage in ("base", "sft")] == ["reused"] * 2
    assert [ran(whole.output, stage) for stage in (*MADE, *TRAINED)] == ["done"] * 7
    drawn, scored, pairs, best = (records(whole, stage) for stage in MADE)
    assert len(drawn) == len(scored) == PROMPTS
    assert drawn[0]["sources"] == ["data.chosen", "data.rejected", *["sft"] * 3, *["base"] * 3]
    assert [row["responses"] for row in scored] == [row["responses"] for row in drawn]
    assert all(row["chosen_score"] - row["rejected_score"] >= 0.01 for row in pairs)
    assert [row["source"] for row in best[:200]] == ["data"] * 200
    assert len(best) == 200 + PROMPTS
    manifest = json.loads((whole.stage("dpo", "records") / "manifest.json").read_text())
    assert manifest["data"]["pairs"]["examples"] == len(pairs)
    assert "pairs" in manifest["inputs"]


def test_the_same_command_again_reuses_everything_and_nothing_is_garbage(whole: Cli) -> None:
    output = whole.run(recipe=RECIPE)
    assert [ran(output, stage) for stage in (*MADE, *TRAINED)] == ["reused"] * 7
    kept = {whole.stage(stage, "records").resolve() for stage in (*MADE, *TRAINED)}
    whole("gc")
    assert all(folder.is_dir() for folder in kept)
    plan = whole("plan", str(RECIPE), "--tokens")
    assert "run" not in [word for line in plan.splitlines() for word in line.split()[2:3]]
    assert any(line.split()[:3] == ["dpo", "pairs", str(len(records(whole, "pairs")))] for line in plan.splitlines())


def test_data_commands_look_into_records(whole: Cli, tmp_path: Path) -> None:
    assert "data.rejected" in whole("data", "preview", str(RECIPE), "drawn", "--rows", "1")
    assert "prompts that `asked` has as well" in whole("data", "check", str(RECIPE), "pairs")
    assert "⟦" in whole("data", "mask", str(RECIPE), "scored", "--stage", "rrhf", "--rows", "1")
    empty = Cli(tmp_path)
    told = empty("data", "preview", str(RECIPE), "pairs", code=4)
    assert "the records are made by stage `pairs`, which has not run yet" in told
    assert "known after pairs" in empty("plan", str(RECIPE))


def test_the_report_shows_what_was_made(whole: Cli) -> None:
    page = (whole.folder / "runs" / "records" / "report.html").read_text()
    for words in ("in no pair", "not among the best", "data.chosen", "sft@pairs"):
        assert words in page


def started(cli: Cli, *arguments: str, until: Callable[[], bool]) -> Any:
    """A run that has come so far."""
    process = cli.start("run", *arguments)
    deadline = time.monotonic() + 250
    while not until():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def chunks(cli: Cli) -> list[Path]:
    return sorted((cli.home / "work").glob("*/chunks/*.jsonl"))


def test_killed_while_drawing(whole: Cli, tmp_path: Path) -> None:
    cli = copied(whole, tmp_path / "killed")
    forget(cli, "drawn")
    cli._kill_all(started(cli, str(RECIPE), "--until", "drawn", until=lambda: len(chunks(cli)) >= 2))
    first = chunks(cli)[0]
    there = sum(len(path.read_text().splitlines()) for path in chunks(cli))
    assert 0 < there < 2 * PROMPTS
    # What is there is taken as it is: a text that no model would say is still there in the end.
    key, answers = json.loads(first.read_text().splitlines()[0])
    marked = json.dumps([key, [answers[0] | {"text": "kept"}, *answers[1:]]])
    first.write_text("\n".join([marked, *first.read_text().splitlines()[1:]]) + "\n")
    output = cli.run("--until", "drawn", recipe=RECIPE)
    assert f"resumed at step {there}" in output
    policy, row = key.split("/")
    found = records(cli, "drawn")
    place = found[int(row)]["sources"].index(policy)
    assert found[int(row)]["responses"][place] == "kept"
    found[int(row)]["responses"][place] = answers[0]["text"]
    assert found == records(whole, "drawn")


def test_stopped_while_drawing(whole: Cli, tmp_path: Path) -> None:
    cli = copied(whole, tmp_path / "stopped")
    forget(cli, "drawn")
    process = started(cli, str(RECIPE), "--until", "drawn", until=lambda: len(chunks(cli)) >= 1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "stopped by a signal; what is finished is kept" in output
    assert "resume at" in cli("plan", str(RECIPE))
    assert ran(cli.run("--until", "drawn", recipe=RECIPE), "drawn") == "resumed"
    assert digest(cli, "drawn") == digest(whole, "drawn")


def test_two_processes_give_the_records_of_one(whole: Cli, tmp_path: Path) -> None:
    cli = copied(whole, tmp_path / "two")
    forget(cli, "drawn", "scored")
    cli.run("--until", "scored", "--set", "launch={processes: 2, deepspeed: none}", recipe=RECIPE)
    assert [digest(cli, stage) for stage in ("drawn", "scored")] == [digest(whole, s) for s in ("drawn", "scored")]


SLOW = """
import time
from pathlib import Path

def slow(prompt, completion):
    time.sleep(0.02)
    with (Path(__file__).parent / "asked.txt").open("a") as file:
        file.write(f"{prompt!r} {completion!r}\\n")
    return float(len(completion))
"""


def test_killed_while_scoring_with_a_function(whole: Cli, tmp_path: Path) -> None:
    cli = copied(whole, tmp_path / "scoring")
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["stages"]["scored"] |= {"functions": ["slow.py:slow"]}
    path, asked = cli.folder / "records.yaml", cli.folder / "asked.txt"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    (cli.folder / "slow.py").write_text(SLOW)
    refused = cli("run", str(path), "--until", "scored", code=4)
    assert "stages.scored.functions.0: stage `scored` runs code of its own, slow.py:slow" in refused
    assert not asked.exists()
    arguments = (str(path), "--until", "scored", "--allow-code")
    cli._kill_all(started(cli, *arguments, until=lambda: len(chunks(cli)) >= 1 and asked.exists()))
    done = {json.loads(line)[0] for chunk in chunks(cli) for line in chunk.read_text().splitlines()}
    assert 0 < len(done) < PROMPTS
    assert ran(cli.run(*arguments[1:], recipe=path), "scored") == "resumed"
    lines = asked.read_text().splitlines()
    finished = [row for number, row in enumerate(records(cli, "drawn"), start=1) if str(number) in done]
    for row in finished:
        for text in {each for each in row["responses"] if each.strip()}:
            assert lines.count(f"{row['prompt'][-1]['content']!r} {text!r}") == 1
    asked.unlink()
    again = digest(cli, "scored")
    cli.run(*arguments[1:], "--from", "scored", recipe=path)
    assert digest(cli, "scored") == again
