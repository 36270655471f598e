"""Stages that make records: named like data, told like data, planned before there is a file."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from align.artifacts.store import Store
from align.errors import LaunchError, RecipeError
from align.recipe import Graph, build_graph, load_recipe
from align.recipe.made import RECORDS, records_file
from align.recipe.plan import Plan, make_plan
from align.recipe.plan_table import plan_table
from align.recipe.rules import check_rules
from align.runner.folder import resolved
from align.runner.inspect import stage_reading
from align.runner.job import make_job
from align.runner.run import run_recipe
from align.spec.data import FileData

Check = Callable[..., Graph]
Refuse = Callable[..., str]

HEAD = """\
name: demo
model: {base: base, quantization: nf4}
data:
  corpus: {generator: film-reviews, part: corpus, rows: 8, format: prompt_completion}
  pairs: {path: pairs.jsonl, format: pairs}
  heldout: {generator: film-reviews, part: heldout, rows: 8, format: prompts}
stages:
  base: {kind: pretrain, data: corpus}
  sft: {kind: sft, data: corpus}
  rm: {kind: reward, policy: sft, data: pairs}
"""
ONE = """\
  draw1: {kind: sample, policies: [sft], prompts: heldout}
  score1: {kind: score, samples: draw1, reward: rm}
  pairs1: {kind: select, candidates: score1, how: best_worst}
  dpo1: {kind: dpo, policy: sft, reference: sft, data: pairs1}
"""
RECIPE = HEAD + ONE
TWO = """\
  draw2: {kind: sample, policies: [dpo1], prompts: heldout}
  score2: {kind: score, samples: draw2, reward: rm}
  pairs2: {kind: select, candidates: score2, how: best_worst}
  dpo2: {kind: dpo, policy: dpo1, reference: sft, data: pairs2}
"""


def test_stages_name_each_other_round_after_round(check: Check, tmp_path: Path) -> None:
    graph = check(RECIPE + TWO)
    check_rules(graph)
    assert list(graph.nodes)[3:] == ["draw1", "score1", "pairs1", "dpo1", "draw2", "score2", "pairs2", "dpo2"]
    assert sorted(graph.nodes["dpo2"].parents) == ["base", "dpo1", "pairs2", "sft"]
    assert graph.nodes["score1"].parents == ("rm", "draw1")
    assert graph.descendants("draw1") >= {"score1", "dpo1", "draw2", "dpo2"}
    assert set(graph.upto("dpo1").nodes) == {"base", "sft", "rm", "draw1", "score1", "pairs1", "dpo1"}
    made = graph.nodes["dpo1"].data["pairs1"]
    fingerprint = graph.nodes["pairs1"].fingerprint
    assert made == FileData(path=str(tmp_path / "home" / "artifacts" / fingerprint[:16] / RECORDS), format="pairs")
    assert made.path == str(records_file(fingerprint, tmp_path / "home"))
    assert Path(made.path).parent == Store(tmp_path / "home").folder(fingerprint)
    assert graph.nodes["draw1"].data == {"heldout": graph.loaded.recipe.data["heldout"]}


def test_the_job_reads_the_file_of_the_store(check: Check, tmp_path: Path) -> None:
    graph = check(RECIPE)
    job = make_job(graph, graph.nodes["score1"], home=tmp_path / "home", work=tmp_path)
    assert job.data["draw1"].path == str(records_file(job.inputs["draw1"], tmp_path / "home"))
    assert job.data["draw1"].format == "samples"
    assert set(job.inputs) == {"draw1", "rm"}


@pytest.mark.parametrize(
    ("old", "new", "told", "fix"),
    [
        ("samples: draw1", "samples: darw1",
         "12: stages.score1.samples: there is no data entry and no stage that makes records `darw1`; "
         "did you mean `draw1`?", "one of: draw1; or add it under `data`"),
        ("data: pairs1", "data: pair1",
         "14: stages.dpo1.data: there is no data entry and no stage that makes records `pair1`; did you mean `pairs1`?",
         "one of: pairs, pairs1; or add it under `data`"),
        ("samples: draw1", "samples: sft",
         "12: stages.score1.samples: stage `sft` produces a policy, and no records", "one of: draw1"),
        ("candidates: score1", "candidates: draw1",
         "13: stages.pairs1.candidates: `draw1` makes samples records; select reads ranked records",
         "add a stage in between: {kind: score, samples: draw1, ...}; others that serve: score1"),
        ("data: pairs1", "data: score1",
         "14: stages.dpo1.data: `score1` makes ranked records; dpo reads pair records",
         "add a stage in between: {kind: select, candidates: score1, how: ...}; others that serve: pairs, pairs1"),
        ("data: pairs1", "data: draw1",
         "14: stages.dpo1.data: `draw1` makes samples records; dpo reads pair records",
         "add two in between: {kind: score, samples: draw1, ...}, {kind: select, candidates: SCORED, how: ...}"),
        ("how: best_worst", "how: best_of_n",
         "14: stages.dpo1.data: `pairs1` makes conversation records; dpo reads pair records",
         "name records of another kind, or change what `pairs1` makes; others that serve: pairs"),
        ("samples: draw1", "samples: pairs",
         "12: stages.score1.samples: `pairs` has the format pairs, which holds pair records; score reads samples or",
         "formats that serve: ranked, samples"),
        ("candidates: score1", "candidates: pairs1",
         "13: stages.pairs1.candidates: stage `pairs1` names itself", "name other records, one of: score1"),
        ("policies: [sft]", "policies: [sft, sft]",
         "11: stages.draw1.policies.1: `sft` is named twice", "name it once"),
        ("policies: [sft]", "policies: [rm]",
         "11: stages.draw1.policies.0: `rm` produces a reward model, not a policy", "one of: base, sft, dpo1"),
        ("policy: sft, reference", "policy: pairs1, reference",
         "14: stages.dpo1.policy: `pairs1` produces records, not a policy", "one of: base, sft"),
        ("reward: rm}", "reward: rm, weights: {rewrad: 2}}",
         "12: stages.score1.weights.rewrad: no score of stage `score1` is called `rewrad`; did you mean `reward`?",
         "one of: reward"),
        ("reward: rm}", "functions: [mine.py]}",
         "12: stages.score1.functions.0: `mine.py` names no function", "write file.py:function"),
        ("reward: rm}", "functions: ['mine.py:score']}",
         "12: stages.score1.functions.0: there is no file mine.py", "paths start at"),
        ("how: best_worst", "how: best_worst, fraction: 0.5",
         "13: stages.pairs1.fraction: `fraction` has no effect: only `how: top_fraction` reads it", "remove it"),
        ("prompts: heldout}", "prompts: heldout, diversity_penalty: 2}",
         "11: stages.draw1.diversity_penalty: `diversity_penalty` has no effect: only groups of beams",
         "remove it, or write `decoding: diverse_beam`"),
        ("prompts: heldout}", "prompts: heldout, decoding: beam, generation: {seed: 1}}",
         "11: stages.draw1.generation.seed: `seed` has no effect: beams are searched, not drawn",
         "remove it, or write `decoding: sample`"),
        ("prompts: heldout}", "prompts: heldout, decoding: beam, engine: vllm}",
         "11: stages.draw1.engine: `engine` has no effect: beams are searched by align itself", "remove it, or write"),
        ("prompts: heldout}", "prompts: heldout, generation: {temperature: 0}}",
         "11: stages.draw1: temperature 0 gives 4 times the same answer", ""),
        ("samples: draw1, reward: rm", "samples: draw1",
         "12: stages.score1: nothing scores the candidates: name a `reward` stage, `scorers` or `functions`", ""),
    ],
)  # fmt: skip
def test_one_mistake(refuse: Refuse, old: str, new: str, told: str, fix: str) -> None:
    assert old in RECIPE
    lines = refuse(RECIPE.replace(old, new, 1)).splitlines()
    assert lines[0].startswith(told)
    if fix:
        assert lines[1].startswith(f"  fix: {fix}")
    assert len([line for line in lines if "fix:" not in line]) == 1, lines


def test_a_name_that_is_both_is_refused_even_where_nobody_reads_it(refuse: Refuse, check: Check) -> None:
    told = refuse(RECIPE.replace("pairs1", "pairs"))
    assert told.startswith(
        "13: stages.pairs: the stage `pairs` makes records, and an entry of `data` has the same name\n  fix: rename one"
    )
    check(
        RECIPE.replace("rm: {", "heldout: {").replace("reward: rm", "reward: heldout")
    )  # a stage that makes no records cannot be meant


def test_a_scorer_with_the_name_of_a_stage_is_no_edge(check: Check) -> None:
    text = RECIPE.replace("draw1", "film-reviews").replace("reward: rm", "scorers: [film-reviews]", 1)
    graph = check(text + "  other: {kind: score, samples: pairs0, scorers: [film-reviews]}\n".replace("pairs0", "more"),
                  "data.more={path: rows.jsonl, format: samples}")  # fmt: skip
    assert graph.nodes["other"].parents == ()


def test_rounds_that_wait_for_each_other_are_a_cycle(refuse: Refuse) -> None:
    told = refuse(RECIPE.replace("policies: [sft]", "policies: [dpo1]"))
    (drawn,) = (line for line in told.splitlines() if "wait for each other" in line)
    path = drawn.partition("each other: ")[2].split(" -> ")
    assert sorted(set(path)) == ["dpo1", "draw1", "pairs1", "score1"]


def prints(graph: Graph) -> dict[str, str]:
    return {name: node.fingerprint for name, node in graph.nodes.items()}


def changed(before: Graph, after: Graph) -> list[str]:
    first, second = prints(before), prints(after)
    return [name for name in first if first[name] != second[name]]


FOLLOWING = ["draw1", "score1", "pairs1", "dpo1"]


@pytest.mark.parametrize(
    ("old", "new", "stages"),
    [
        ("prompts: heldout}", "prompts: heldout, completions: 8}", FOLLOWING),
        ("prompts: heldout}", "prompts: heldout, generation: {seed: 1}}", FOLLOWING),
        ("prompts: heldout}", "prompts: heldout, engine: vllm}", FOLLOWING),
        ("prompts: heldout}", "prompts: heldout, decoding: beam}", FOLLOWING),
        ("reward: rm}", "reward: rm, missing_eos: keep}", FOLLOWING[1:]),
        ("reward: rm}", "reward: rm, weights: {reward: 2}}", FOLLOWING[1:]),
        ("how: best_worst", "how: all_pairs", FOLLOWING[2:]),
        ("how: best_worst", "how: best_worst, min_margin: 0.5", FOLLOWING[2:]),
        # what cannot change them
        ("prompts: heldout}", "prompts: heldout, generation: {batch_size: 1}, launch: {processes: 2}}", []),
        ("reward: rm}", "reward: rm, launch: {processes: 2}}", []),
    ],
)
def test_records_count_by_what_makes_them(check: Check, old: str, new: str, stages: list[str]) -> None:
    assert old in RECIPE
    assert changed(check(RECIPE), check(RECIPE.replace(old, new, 1))) == stages


def test_records_do_not_count_by_their_file_and_samples_have_the_names_of_their_policies(
    check: Check, tmp_path: Path
) -> None:
    before = check(RECIPE)
    file = Path(before.nodes["dpo1"].data["pairs1"].path)
    file.parent.mkdir(parents=True)
    file.write_text("{}\n")
    assert changed(before, check(RECIPE)) == []
    renamed = check(
        RECIPE.replace("pairs1", "votes")
        .replace("draw1", "drawn")
        .replace("rm: {", "judge: {")
        .replace("reward: rm", "reward: judge")
    )
    assert before.nodes["dpo1"].fingerprint == renamed.nodes["dpo1"].fingerprint
    other = check(RECIPE.replace("sft:", "tuned:").replace("[sft]", "[tuned]").replace(": sft,", ": tuned,")
                  .replace("{kind: tuned", "{kind: sft"))  # fmt: skip
    assert before.nodes["sft"].fingerprint == other.nodes["tuned"].fingerprint
    assert before.nodes["draw1"].fingerprint != other.nodes["draw1"].fingerprint


def test_a_function_counts_by_its_file_and_name(check: Check, tmp_path: Path) -> None:
    text = RECIPE.replace("reward: rm", "functions: ['mine.py:score']", 1)
    (tmp_path / "mine.py").write_text("def score(prompt, completion): return 1.0\n")
    before = check(text)
    (tmp_path / "mine.py").write_text("def score(prompt, completion): return 2.0\n")
    assert changed(before, check(text)) == FOLLOWING[1:]
    after = check(text)
    assert changed(after, check(text.replace("mine.py:score", "mine.py:other"))) == FOLLOWING[1:]
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "mine.py", tmp_path / "sub" / "moved.py")
    assert changed(after, check(text.replace("mine.py:score", "sub/moved.py:score"))) == []


def test_code_runs_where_it_is_allowed_only(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("")
    graph = check(RECIPE.replace("reward: rm", "functions: ['mine.py:score']", 1))
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "home"))
    with pytest.raises(LaunchError) as caught:
        run_recipe(graph.loaded.path)
    assert "stages.score1.functions.0: stage `score1` runs code of its own, mine.py:score" in str(caught.value)
    assert "--allow-code" in str(caught.value.fix)
    content = resolved(graph.loaded)
    assert content["stages"]["score1"]["functions"] == [str(tmp_path / "mine.py:score")]


def planned(graph: Graph, *finished: str) -> Plan:
    done = {graph.nodes[name].fingerprint for name in finished}
    return make_plan(graph, done.__contains__, compute_bytes=4)


def shown(plan: Plan) -> list[list[str]]:
    out = io.StringIO()
    Console(file=out, width=240).print(plan_table(plan))
    return [line.split() for line in out.getvalue().splitlines() if line.strip()]


def test_the_plan_says_after_which_stage_the_steps_are_known(check: Check) -> None:
    plan = planned(check(RECIPE))
    rows = {row.stage: row for row in plan.rows}
    assert (rows["dpo1"].steps, rows["dpo1"].known_after) == (None, "pairs1")
    assert rows["draw1"].notes[0] == "4 answers of sft to ≤ 8 prompts"
    memory = rows["draw1"].memory
    assert set(memory) - {"logits", "prompts"} == {"base", "frozen adapters", "keys and values"}
    assert len(memory) == 4, "the larger of what a pass over prompts and what logits take"
    assert rows["draw1"].total_memory == sum(memory.values())
    assert rows["score1"].memory["frozen adapters"] > 0
    assert (rows["pairs1"].total_memory, rows["pairs1"].notes) == (None, ("best_worst of score1",))
    assert rows["score1"].notes == ("draw1 scored by reward",)
    lines = {words[0]: " ".join(words) for words in shown(plan)}
    assert "dpo run known after pairs1" in lines["dpo1"]
    assert lines["sft@pairs1"].startswith("sft@pairs1 reference run known after pairs1")
    (node,) = plan.references
    assert (node.name, node.state, node.known_after, node.users) == ("sft@pairs1", "run", "pairs1", ("dpo1",))


def test_steps_that_are_set_are_known(check: Check) -> None:
    rows = {row.stage: row for row in planned(check(RECIPE, "stages.dpo1.train={max_steps: 7}")).rows}
    assert rows["dpo1"].steps == 7


def test_once_they_are_made_records_are_counted(check: Check) -> None:
    graph = check(RECIPE)
    file = Path(graph.nodes["dpo1"].data["pairs1"].path)
    file.parent.mkdir(parents=True)
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    file.write_text((json.dumps(row) + "\n") * 40)
    plan = planned(graph, "base", "sft", "rm", "draw1", "score1", "pairs1")
    rows = {each.stage: each for each in plan.rows}
    assert (rows["dpo1"].steps, rows["dpo1"].known_after) == (3, None)
    assert [(node.rows, node.at_most) for node in plan.references] == [(80, True)]


def test_records_that_are_gone_need_no_reference_of_a_finished_stage(check: Check) -> None:
    (node,) = planned(check(RECIPE), "base", "sft", "dpo1").references
    assert node.state == "reuse"


def test_data_commands_know_the_records_of_stages(check: Check) -> None:
    graph = check(RECIPE)
    assert stage_reading(graph, "pairs1", None).name == "dpo1"
    assert stage_reading(graph, "draw1", "score1").name == "score1"
    with pytest.raises(RecipeError, match="the recipe has no data `pairs2`; did you mean `pairs`"):
        stage_reading(graph, "pairs2", None)
    alone = check(RECIPE + "  more: {kind: select, candidates: score1, how: all_pairs}\n")
    with pytest.raises(RecipeError, match="no stage reads what `more` makes"):
        stage_reading(alone, "more", None)


def test_several_turns_are_not_scored(refuse: Refuse) -> None:
    text = RECIPE.replace("  pairs: {", "  bench: {path: rows.jsonl, format: mt_bench}\n  pairs: {")
    told = refuse(text.replace("samples: draw1", "samples: bench"))
    assert (
        told.splitlines()[0] == "13: stages.score1.samples: `bench` has the format mt_bench, which score does not read"
    )
    assert told.splitlines()[1] == "  fix: formats that serve: ranked, samples"


def test_a_recipe_with_records_runs_from_its_copy(check: Check, tmp_path: Path) -> None:
    from align.recipe.document import dump

    graph = check(RECIPE + TWO)
    copy = tmp_path / "elsewhere" / "recipe.yaml"
    copy.parent.mkdir()
    copy.write_text(dump(resolved(graph.loaded)))
    assert prints(build_graph(load_recipe(copy), tmp_path / "home")) == prints(graph)
