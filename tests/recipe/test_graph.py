"""What stages may say about each other: order, names, ports, lineage, and settings that something reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from align.errors import RecipeError
from align.recipe import Graph, build_graph, load_recipe
from align.recipe.rules import check_rules

Check = Callable[..., Graph]
Refuse = Callable[..., str]

VALID = sorted((Path(__file__).parent / "valid").glob("*.yaml"))

HEAD = """\
name: demo
model: {base: base, quantization: nf4}
data:
  corpus: {generator: film-reviews, part: corpus, rows: 8, format: prompt_completion}
  pairs: {path: pairs.jsonl, format: pairs}
  heldout: {generator: film-reviews, part: heldout, rows: 8, format: prompts}
stages:
"""
BASE = "  base: {kind: pretrain, data: corpus}\n"
SFT = "  sft: {kind: sft, data: corpus}\n"
DPO = "  dpo: {kind: dpo, policy: sft, reference: sft, data: pairs}\n"
COMPARE = "  last: {kind: compare, candidates: [base, sft, dpo], baseline: sft, prompts: heldout}\n"
RECIPE = HEAD + BASE + SFT + DPO + COMPARE


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_valid_recipes_have_no_mistake(path: Path, tmp_path: Path) -> None:
    loaded = load_recipe(path)
    graph = build_graph(loaded, tmp_path)
    check_rules(graph)
    assert set(graph.nodes) == set(loaded.stages)


def test_a_node_has_all_it_is_made_from(check: Check) -> None:
    graph = check(RECIPE)
    dpo, last = graph.nodes["dpo"], graph.nodes["last"]
    assert dpo.parents == ("sft", "base")
    assert list(dpo.data) == ["pairs"]
    assert dpo.model is not None
    assert (dpo.model.base, dpo.model.quantization) == ("base", "nf4")
    assert last.parents == ("base", "sft", "dpo")
    assert last.model is None
    assert graph.nodes["base"].model is None
    assert len({node.fingerprint for node in graph.nodes.values()}) == 4


def test_a_stage_overrides_model_and_launch(check: Check) -> None:
    own = "  sft: {kind: sft, data: corpus, model: {quantization: none}, launch: {processes: 2}}\n"
    graph = check(
        HEAD.replace("pairs: {", "more: {") + BASE + own + "  dpo: {kind: sft, policy: base, data: corpus}\n"
        "  p: {kind: dpo, reference: sft, data: more, model: {quantization: none}}\n"
        "  c: {kind: compare, candidates: [sft], baseline: sft, prompts: heldout}\n"
        "launch: {processes: 4}\n"
    )
    assert graph.nodes["sft"].model.quantization == "none"
    assert graph.nodes["dpo"].model.quantization == "nf4"
    assert (graph.nodes["sft"].launch.processes, graph.nodes["dpo"].launch.processes) == (2, 4)


def test_an_override_of_the_adapter_keeps_what_it_does_not_name(check: Check) -> None:
    head = HEAD.replace("nf4}", "nf4, adapter: {rank: 8, alpha: 4, targets: [q_proj]}}")
    stages = "  sft: {kind: sft, data: corpus, model: {adapter: {rank: 2}}}\n"
    stages += (
        "  dpo: {kind: dpo, policy: sft, reference: sft, data: pairs, model: {adapter: {rank: 2, dropout: 0.1}}}\n"
    )
    graph = check(head + BASE + stages + COMPARE)
    adapters = [graph.nodes[name].model.adapter for name in ("sft", "dpo")]
    assert [(each.rank, each.alpha, each.targets) for each in adapters] == [(2, 4, ["q_proj"])] * 2
    assert [each.dropout for each in adapters] == [0.0, 0.1]


@pytest.mark.parametrize(
    ("stages", "order"),
    [
        ((BASE, SFT, DPO, COMPARE), ["base", "sft", "dpo", "last"]),
        ((COMPARE, DPO, SFT, BASE), ["base", "sft", "dpo", "last"]),
        (
            (BASE, SFT, DPO, "  other: {kind: pretrain, data: corpus}\n", COMPARE),
            ["base", "sft", "dpo", "other", "last"],
        ),
        (("  z: {kind: pretrain, data: corpus}\n", COMPARE, BASE, SFT, DPO), ["z", "base", "sft", "dpo", "last"]),
    ],
)
def test_parents_come_first_and_otherwise_the_recipe_decides(
    check: Check, stages: tuple[str, ...], order: list[str]
) -> None:
    assert list(check(HEAD + "".join(stages)).nodes) == order


def test_upto_and_descendants(check: Check) -> None:
    graph = check(RECIPE)
    assert list(graph.upto("sft").nodes) == ["base", "sft"]
    assert list(graph.upto("dpo").nodes) == ["base", "sft", "dpo"]
    assert graph.upto(None) is graph
    assert graph.descendants("sft") == {"dpo", "last"}
    assert graph.descendants("last") == set()


def test_a_long_chain_is_no_problem(check: Check) -> None:
    head = HEAD.replace("pairs: {path: pairs.jsonl, format: pairs}", "more: {path: pairs.jsonl, format: alpaca}")
    chain = "".join(f"  s{i}: {{kind: sft, policy: s{i + 1}, data: more}}\n" for i in range(1200))
    graph = check(
        head + BASE + chain + "  s1200: {kind: sft, data: more}\n"
        "  c: {kind: compare, candidates: [s0], baseline: s0, prompts: heldout}\n"
    )
    assert list(graph.nodes)[:2] == ["base", "s1200"]
    assert list(graph.nodes)[-2:] == ["s0", "c"]


@pytest.mark.parametrize(
    ("old", "new", "told", "fix"),
    [
        # names
        (
            "policy: sft",
            "policy: stf",
            "10: stages.dpo.policy: there is no stage `stf`; did you mean `sft`?",
            "one of: base, sft",
        ),
        ("reference: sft", "reference: xyz", "10: stages.dpo.reference: there is no stage `xyz`", "one of: base, sft"),
        (
            "[base, sft, dpo]",
            "[base, sft, dop]",
            "11: stages.last.candidates.2: there is no stage `dop`; did you mean `dpo`?",
            "one of: base, sft, dpo",
        ),
        (
            "data: pairs}",
            "data: pair}",
            "10: stages.dpo.data: there is no data entry `pair`; did you mean `pairs`?",
            "one of: pairs; or add it",
        ),
        (
            "policy: sft",
            "policy: dpo",
            "10: stages.dpo.policy: stage `dpo` names itself",
            "name another stage, one of: base, sft",
        ),
        (
            "{base: base,",
            "{base: bsae,",
            "2: model.base: `bsae` is no stage and no folder; did you mean `base`?",
            "name one, or a Hub model",
        ),
        ("{base: base,", "{base: ./models/x,", "2: model.base: there is no folder ./models/x", "paths start at"),
        ("{base: base,", "{base: last,", "2: model.base: `last` trains nothing, it is no base", "one of: base"),
        ("{base: base,", "{base: sft,", "2: model.base: `sft` trains an adapter, it is no base", "write `policy: sft`"),
        ("  dpo: {", "  d.p: {", "10: stages.d.p: the name 'd.p' has a character that is not allowed", "use letters"),
        ("  last: {", "  logs: {", "11: stages.logs: the name 'logs' is used by the run's folder", "use letters"),
        # ports
        (
            "policy: sft",
            "policy: last",
            "10: stages.dpo.policy: `last` produces a comparison, not a policy",
            "one of: base, sft",
        ),
        (
            "data: pairs}",
            "data: heldout}",
            "10: stages.dpo.data: `heldout` has the format prompts, which holds prompt records; dpo reads pair records",
            "formats that serve: pairs, labelled_pairs; entries that do: pairs",
        ),
        (
            "sft, data: corpus",
            "sft, data: pairs",
            "9: stages.sft.data: `pairs` has the format pairs, which holds pair records; sft reads",
            "formats that serve: text, alpaca, messages,",
        ),
        # comparison
        (
            "[base, sft, dpo]",
            "[base, dpo]",
            "11: stages.last.baseline: the baseline `sft` is not among the candidates",
            "add it to `candidates`, or name one of base, dpo",
        ),
        ("[base, sft, dpo]", "[sft, dpo, sft]", "11: stages.last.candidates.2: `sft` is named twice", "name it once"),
        (
            "prompts: heldout}",
            "prompts: heldout, scorers: [film-review]}",
            "11: stages.last.scorers.0: nothing is registered as `film-review` in align.scorers; did you mean",
            "one of: film-reviews",
        ),
        # what lies outside
        (
            "path: pairs.jsonl",
            "path: pears.jsonl",
            "5: data.pairs.path: there is no file pears.jsonl; did you mean `pairs.jsonl`?",
            "paths start at",
        ),
        (
            "path: pairs.jsonl",
            "path: pairs.txt",
            "5: data.pairs.path: nothing reads a file that is called pairs.txt",
            "name it .json",
        ),
        (
            "format: pairs}",
            "format: pairs, columns: {chosn: good}}",
            "5: data.pairs.columns.chosn: format pairs has no field `chosn`; did you mean `chosen`?",
            "its fields: prompt,",
        ),
        ("path: pairs.jsonl", "path: .", "5: data.pairs.path: . is a folder", "name a file in it"),
        (
            "part: corpus",
            "part: corpse",
            "4: data.corpus.part: film-reviews has no part `corpse`; did you mean `corpus`?",
            "one of: corpus,",
        ),
        (
            "format: prompts",
            "format: prompt_completion",
            "6: data.heldout.format: rows of part `heldout` have the format prompts, not prompt_completion",
            "write format: prompts",
        ),
        (
            "corpus, rows: 8",
            "corpus, rows: 8, options: {label_nose: 0.1}",
            "4: data.corpus.options.label_nose: unknown key `label_nose`; did you mean `label_noise`?",
            "write `label_noise`",
        ),
        (
            "corpus, rows: 8",
            "corpus, rows: 8, options: {label_noise: 0.1}",
            "4: data.corpus.options.label_noise: part 'corpus' of the film-reviews world ignores label_noise",
            "remove it",
        ),
        (
            "heldout, rows: 8",
            "heldout, rows: 80000",
            "6: data.heldout.rows: 80000 held-out prompts asked for",
            "ask for at most",
        ),
        # nothing reads it
        (COMPARE, "", "6: data.heldout: no stage reads `heldout`", "remove it, or name it in a stage"),
        (
            "nf4}",
            "nf4, revision: v1}",
            "2: model.revision: `revision` is ignored: `base` is not on the Hub",
            "remove it",
        ),
        (
            "sft, data: corpus",
            "sft, data: corpus, train: {lr_scheduler: constant, warmup_ratio: 0.1}",
            "9: stages.sft.train.warmup_ratio: `warmup_ratio` has no effect: a constant learning rate has no warm-up",
            "remove it",
        ),
        (
            "model: {base: base, quantization: nf4}\n",
            "",
            "8: stages.sft: stage `sft` trains a model, and the recipe names none",
            "add `model: {base: base}`",
        ),
    ],
)
def test_one_mistake(refuse: Refuse, old: str, new: str, told: str, fix: str) -> None:
    assert old in RECIPE
    lines = refuse(RECIPE.replace(old, new, 1)).splitlines()
    assert lines[0].startswith(told)
    assert lines[1].startswith(f"  fix: {fix}")
    assert len(lines) == 2 or "names none" in told or "character" in told, lines


def test_cycles_are_drawn(refuse: Refuse) -> None:
    ring = "".join(f"  {a}: {{kind: sft, policy: {b}, data: corpus}}\n" for a, b in ("ac", "ba", "cb"))
    told = refuse(HEAD + BASE + ring)
    drawn = [line for line in told.splitlines() if "stages wait for each other" in line]
    assert len(drawn) == 1
    path = drawn[0].partition("each other: ")[2].split(" -> ")
    assert path[0] == path[-1]
    assert sorted(path[1:]) == ["a", "b", "c"]
    arrows = {"a": "c", "b": "a", "c": "b"}
    assert all(arrows[a] == b for a, b in pairwise(path))


def test_a_comparison_needs_no_model_and_a_model_needs_a_reader(check: Check, refuse: Refuse) -> None:
    only = HEAD.replace("  pairs: {path: pairs.jsonl, format: pairs}\n", "") + BASE
    only += "  last: {kind: compare, candidates: [base], baseline: base, prompts: heldout}\n"
    assert refuse(only).startswith("2: model: no stage reads `model`")
    assert list(check(only.replace("model: {base: base, quantization: nf4}\n", "")).nodes) == ["base", "last"]


FURTHER = "  s: {kind: sft, policy: full, data: corpus}\n"


def dpo(policy: str | None, reference: str | None = None, model: str = "{}") -> str:
    start = f"policy: {policy}, " if policy else ""
    return f"  d: {{kind: dpo, {start}reference: {reference or policy}, data: pairs, model: {model}}}\n"


FULL = "  full: {kind: sft, data: corpus, model: {adapter: none, quantization: none}}\n"


@pytest.mark.parametrize(
    ("stages", "bases"),
    [
        # an adapter goes on from its parent's, on the same base
        ([SFT, dpo('sft')], {"d": "base"}),
        # a parent trained in full is the base of its child, whatever the recipe's base, if its lineage holds that base
        ([dpo('base')], {"d": "base"}),
        ([FULL, dpo('full')], {"full": "base", "d": "full"}),
        ([FULL, dpo('full', model='{base: full}')], {"d": "full"}),
        ([FULL, FURTHER, dpo('s', reference='full')], {"s": "full", "d": "full"}),
        # without a parent the declared base holds, a stage or not
        ([FULL, dpo(None, reference='full', model='{base: full}')], {"d": "full"}),
        # full training reads another model's log-probabilities beforehand
        ([FULL, dpo('full', reference='base', model='{adapter: none, quantization: none}')], {"d": "full"}),
        # merging makes a base of its own, with an adapter of any shape on it
        ([SFT, dpo('sft', model='{merge_parent: true, adapter: {rank: 4}}')], {"d": "base"}),
        # dropout may differ
        ([SFT, dpo('sft', model='{adapter: {dropout: 0.1}}')], {"d": "base"}),
    ],
)  # fmt: skip
def test_lineages_that_work(check: Check, stages: list[str], bases: dict[str, str]) -> None:
    head = HEAD.replace("  heldout: {generator: film-reviews, part: heldout, rows: 8, format: prompts}\n", "")
    graph = check(head + BASE + "".join(stages))
    for name, base in bases.items():
        assert graph.nodes[name].model.base == base
        assert base in graph.nodes[name].parents


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([SFT, dpo('sft', model='{adapter: {rank: 4}}')],
         "9: stages.d.model.adapter.rank: `d` has rank 4, its parent `sft` has 16"),
        ([SFT, dpo('sft', model='{adapter: {targets: [q_proj]}}')],
         "9: stages.d.model.adapter.targets: `d` has targets ['q_proj'], its parent `sft` has all-linear"),
        ([SFT, dpo('sft', model='{quantization: none}')],
         "9: stages.d.model.quantization: `d` has quantization none, its parent `sft` has nf4"),
        ([SFT, dpo('sft', model='{adapter: none}')],
         "9: stages.d.model.adapter: `d` has adapter none, its parent `sft` has lora"),
        ([SFT, dpo('sft', model='{base: Qwen/Qwen3-0.6B}')],
         "9: stages.d.model.base: `d` goes on from `sft`, which stands on `base`: its base cannot be"),
        ([FULL, dpo('full', model='{base: base}')],
         "9: stages.d.model.base: `d` goes on from `full`, which is a base of its own: its base cannot be"),
        ([SFT, "  o: {kind: pretrain, data: corpus}\n", dpo('sft', reference='o')],
         "10: stages.d.reference: reference `o` stands on the base `o`, the stage's policy on `base`"),
        ([SFT, FULL, dpo('sft', reference='full')],
         "10: stages.d.reference: reference `full` stands on the base `full`, the stage's policy on `base`"),
        ([SFT, "  o: {kind: sft, data: corpus, model: {quantization: none}}\n", dpo('sft', reference='o')],
         "10: stages.d.reference: reference `o` was trained on the base in none, the stage loads it in nf4"),
        ([FULL, SFT, dpo('full', reference='sft', model='{adapter: none}')],
         "10: stages.d.reference: reference `sft` is an adapter, but the stage trains every parameter"),
        ([SFT, "  o: {kind: sft, data: corpus}\n", dpo('sft', reference='o', model='{merge_parent: true}')],
         "10: stages.d.reference: reference `o` is not the parent that is merged into the new base"),
        ([SFT, dpo(None, reference='sft', model='{merge_parent: true}')],
         "9: stages.d.model.merge_parent: stage `d` has no parent to merge"),
        ([FULL, dpo('full', model='{merge_parent: true}')],
         "9: stages.d.model.merge_parent: `full` was trained in full: it has no adapter to merge"),
        ([dpo('{adapter: x/y}', reference='base', model='{adapter: none}')],
         "8: stages.d.policy: the policy is an adapter, but the stage trains every parameter (adapter: none)"),
        ([dpo('{adapter: ./nowhere}', reference='base')],
         "8: stages.d.policy.adapter: there is no folder ./nowhere"),
    ],
)  # fmt: skip
def test_lineages_that_cannot_be(refuse: Refuse, stages: list[str], told: str) -> None:
    head = HEAD.replace("  heldout: {generator: film-reviews, part: heldout, rows: 8, format: prompts}\n", "")
    lines = refuse(head + BASE + "".join(stages)).splitlines()
    assert lines[0].startswith(told), lines
    assert len([line for line in lines if not line.startswith("  fix")]) == 1, lines


def test_a_published_adapter_must_be_what_the_recipe_says(check: Check, refuse: Refuse, tmp_path: Path) -> None:
    head = HEAD.replace("  heldout: {generator: film-reviews, part: heldout, rows: 8, format: prompts}\n", "")
    text = head + BASE + dpo("{adapter: theirs}", reference="base")
    (tmp_path / "theirs").mkdir()
    assert "holds no readable adapter_config.json" in refuse(text)
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(json.dumps({"r": 8, "lora_alpha": 32, "use_rslora": False}))
    assert refuse(text).startswith("8: stages.d.policy: rank is 16, the adapter theirs has 8")
    config.write_text(json.dumps({"r": 16, "lora_alpha": 32, "use_rslora": False}))
    assert check(text).nodes["d"].parents == ("base",)
    pinned = refuse(text.replace("{adapter: theirs}", "{adapter: theirs, revision: v1}"))
    assert pinned.startswith("8: stages.d.policy.revision: `revision` is ignored: `theirs` is not on the Hub")


def test_a_folder_is_found_from_the_recipe_or_from_here(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = HEAD.replace("base: base", "base: mine").replace("  pairs: {path: pairs.jsonl, format: pairs}\n", "")
    text += SFT + "  last: {kind: compare, candidates: [sft], baseline: sft, prompts: heldout}\n"
    prints = []
    for folder in (tmp_path / "mine", tmp_path / "here" / "mine"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        monkeypatch.chdir(folder.parent)
        prints.append(check(text).nodes["sft"].fingerprint)
        (folder / "config.json").write_text('{"a": 1}')
        prints.append(check(text).nodes["sft"].fingerprint)
        (folder / "config.json").unlink()
        folder.rmdir()
    assert prints[0] == prints[2] != prints[1] == prints[3]


def test_names_and_outside_are_told_together(refuse: Refuse) -> None:
    told = refuse(RECIPE.replace("policy: sft", "policy: stf").replace("pairs.jsonl", "none.jsonl"))
    assert [line.partition(":")[0] for line in told.splitlines() if "fix:" not in line] == ["10", "5"]


def test_errors_have_the_exit_code_of_recipes(check: Check) -> None:
    with pytest.raises(RecipeError) as caught:
        check(RECIPE.replace("policy: sft", "policy: stf"))
    assert caught.value.exit_code == 2
