from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from align.cli import app
from align.errors import RecipeError
from align.recipe import build_graph, load_recipe
from align.runner.inspect import View, count_tokens, job_files, show_data, stage_reading
from align.runner.run import run_recipe
from align.runner.tables import tokens_table
from align.stages import inspect

RECIPE = """
name: demo
model: {base: base, adapter: {kind: lora, rank: 4, alpha: 8}}
data:
  corpus: {generator: film-reviews, part: corpus, rows: 40, format: prompt_completion}
  pairs: {generator: film-reviews, part: preferences, rows: 12, format: pairs}
  heldout: {generator: film-reviews, part: heldout, rows: 4, format: prompts}
  rows: {path: rows.jsonl, format: prompt_completion, max_bad_rows: 0.5}
stages:
  base:
    kind: pretrain
    data: corpus
    architecture: {hidden_size: 16, intermediate_size: 32, layers: 1, heads: 2, max_positions: 128}
    tokenizer: {vocab_size: 300}
    train: {max_steps: 1, max_tokens: 128}
  sft: {kind: sft, data: rows, train: {max_tokens: 128}}
  dpo: {kind: dpo, policy: sft, reference: sft, data: pairs, train: {max_tokens: 128}}
  comparison: {kind: compare, candidates: [base, dpo], baseline: base, prompts: heldout}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose base (and so its tokenizer) is made, and the store `home` beside it."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "demo.yaml").write_text(RECIPE)
    (folder / "rows.jsonl").write_text('{"prompt": "Say a.", "completion": "a"}\n' * 3 + '{"prompt": "No answer."}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_HOME", str(folder / "home"))
        patch.chdir(folder)
        run_recipe(folder / "demo.yaml", until="base", console=Console(quiet=True))
    return folder


def look(place: Path, capsys: pytest.CaptureFixture[str], view: View, data: str, *overrides: str) -> tuple[int, str]:
    """Exit code and output of the inspecting process's own code, run here."""
    graph = build_graph(load_recipe(place / "demo.yaml", overrides), place / "home")
    with job_files(graph, [stage_reading(graph, data, None)], place / "home") as paths:
        code = inspect.main([view, *paths, "--data", data, "--rows", "2"])
    told = capsys.readouterr()
    return code, told.err if code else told.out


def test_preview(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = look(place, capsys, "preview", "pairs")
    assert code == 0
    assert text.count("chosen") == text.count("rejected") == 2


def test_mask_of_a_stage_that_has_not_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = look(place, capsys, "mask", "rows")
    assert code == 0
    assert "⟦a<|im_end|>⟧" in text


def test_pretraining_trains_every_token_but_the_first(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = look(place, capsys, "mask", "corpus")
    assert code == 0
    assert text.count("row 0: prompt 1 tokens, ") == 1


def test_prompts_to_be_answered_train_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = look(place, capsys, "mask", "heldout")
    assert code == 2
    assert "stage comparison: data heldout: nothing is trained on these records" in text
    code, text = look(place, capsys, "check", "heldout", "stages.comparison.candidates=[base]")
    assert code == 0
    assert "prompts that `corpus` has as well" in text


def test_check(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = look(place, capsys, "check", "rows")
    assert code == 0
    lines = [line.strip("│┃ ").split("│") for line in text.splitlines()]
    counts = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    assert counts["rows read"] == "4"
    assert counts["examples"] == "1"
    assert counts["prompts that `pairs` has as well"] == "0"


def test_a_tokenizer_that_is_still_to_be_made(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = look(place, capsys, "mask", "rows", "stages.base.train.seed=9")
    assert code == 4
    assert "stage sft: the tokenizer is made by stage `base`, which has not run yet" in text
    assert "fix: align run RECIPE --until base" in text


def test_the_command_ends_with_the_code_of_the_data(place: Path) -> None:
    argv = [sys.executable, "-m", "align", "data", "check", "demo.yaml", "rows", "--set", "data.rows.max_bad_rows=0.1"]
    environment = os.environ | {"ALIGN_HOME": str(place / "home")}
    done = subprocess.run(argv, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_token_counts(place: Path) -> None:
    graph = build_graph(load_recipe(place / "demo.yaml"), place / "home")
    counts = count_tokens(graph, place / "home")
    assert {name: count["report"]["examples"] for name, count in counts.items()} == {"base": 40, "sft": 1, "dpo": 12}
    counts["dpo"] = {"data": "pairs", "known_after": "base"}
    console = Console(width=100)
    with console.capture() as text:
        console.print(tokens_table(counts))
    rows = [line.split() for line in text.get().splitlines()]
    assert any(row[:5] == ["sft", "rows", "1", "0", "3"] for row in rows), "1 of 4 is bad, 2 are duplicates"
    assert ["dpo", "pairs", "known", "after", "base"] in rows


def test_token_counts_before_the_tokenizer_is_made(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = build_graph(load_recipe(place / "demo.yaml"), tmp_path)
    with job_files(graph, list(graph.nodes.values())[:3], tmp_path) as paths:
        assert inspect.main(["count", *paths]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "base": {"data": "corpus", "known_after": "base"},
        "sft": {"data": "rows", "known_after": "base"},
        "dpo": {"data": "pairs", "known_after": "base"},
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data": "pair"}, "the recipe has no data `pair`; did you mean `pairs`?"),
        ({"data": "pairs", "stage": "sft"}, "stage `sft` does not read it\n  fix: one of: dpo"),
        ({"data": "pairs", "stage": "dpoo"}, "the recipe has no stage `dpoo`"),
    ],
)
def test_names_that_are_none(place: Path, arguments: dict[str, str], words: str) -> None:
    graph = build_graph(load_recipe(place / "demo.yaml"), place / "home")
    with pytest.raises(RecipeError) as told:
        show_data("preview", graph, home=place / "home", **arguments)
    assert words in str(told.value)


def test_rows_has_to_be_positive() -> None:
    done = CliRunner().invoke(app, ["data", "preview", "demo.yaml", "rows", "--rows", "0"])
    assert done.exit_code == 2


MADE = """
  rm: {kind: reward, policy: base, data: pairs, train: {max_tokens: 128}}
  drawn: {kind: sample, policies: [base], prompts: heldout, generation: {max_new_tokens: 8}}
  scored: {kind: score, samples: drawn, scorers: [film-reviews]}
  chosen: {kind: select, candidates: scored, how: best_of_n, include: corpus}
  more: {kind: sft, data: chosen, train: {max_tokens: 128}}
  ppo:
    {kind: ppo, policy: base, reference: base, reward: rm, prompts: heldout, ptx: corpus, train: {max_tokens: 128},
     generation: {max_new_tokens: 8}}
"""


@pytest.fixture
def making(place: Path) -> Path:
    """The same with stages that make records, and one that learns from its own."""
    (place / "making.yaml").write_text(RECIPE + MADE)
    return place / "making.yaml"


def test_records_that_are_still_to_be_made(making: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = build_graph(load_recipe(making), making.parent / "home")
    for view, stage in (("preview", "more"), ("mask", "more"), ("check", "more")):
        with job_files(graph, [stage_reading(graph, "chosen", stage)], making.parent / "home") as paths:
            assert inspect.main([view, *paths, "--data", "chosen"]) == 4
        told = capsys.readouterr().err
        assert "stage more: data chosen: the records are made by stage `chosen`, which has not run yet" in told
        assert "fix: align run RECIPE --until chosen" in told
    with job_files(graph, [stage_reading(graph, "corpus", "chosen")], making.parent / "home") as paths:
        assert inspect.main(["check", *paths, "--data", "corpus"]) == 0
    assert "`scored`" not in capsys.readouterr().out, "what is not there shares no prompts"


def test_a_count_tells_which_stage_it_waits_for(making: Path) -> None:
    counts = count_tokens(build_graph(load_recipe(making), making.parent / "home"), making.parent / "home")
    assert counts["more"] == {"data": "chosen", "known_after": "chosen"}
    assert counts["ppo"]["report"]["examples"] == 4
    console = Console(width=100)
    with console.capture() as text:
        console.print(tokens_table(counts))
    lines = {line.split()[0]: line.split() for line in text.get().splitlines() if line.split()}
    assert lines["more"][:5] == ["more", "chosen", "known", "after", "chosen"]
    assert lines["ppo"][1:5] == ["heldout", "4", "0", "0"]


def test_what_a_stage_on_rollouts_reads(making: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = build_graph(load_recipe(making), making.parent / "home")
    for view, data, code in (
        ("check", "heldout", 0),
        ("mask", "heldout", 2),
        ("check", "corpus", 0),
        ("mask", "corpus", 0),
    ):
        with job_files(graph, [stage_reading(graph, data, "ppo")], making.parent / "home") as paths:
            assert inspect.main([view, *paths, "--data", data, "--rows", "1"]) == code, (view, data)
    assert "nothing is trained on these records" in capsys.readouterr().err
