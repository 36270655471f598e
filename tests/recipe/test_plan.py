from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from align.recipe import Graph, build_graph, load_recipe
from align.recipe.plan import Plan, PlanRow, make_plan
from align.recipe.plan_table import plan_table
from align.recipe.rows import count_rows
from align.spec.data import FileData, GeneratedData, HubData
from tests.recipe.conftest import Check

GIB = 2**30

SEVEN = """
name: seven
model: {base: base, quantization: nf4, adapter: {kind: lora, rank: 16, alpha: 32}}
data:
  corpus: {generator: film-reviews, part: corpus, rows: 1000, format: prompt_completion}
  demonstrations: {path: rows.jsonl, format: alpaca}
  preferences: {generator: film-reviews, part: preferences, rows: 100, format: pairs}
  heldout: {generator: film-reviews, part: heldout, rows: 8, format: prompts}
stages:
  base:
    kind: pretrain
    data: corpus
    architecture: {hidden_size: 4096, intermediate_size: 11008, layers: 32, heads: 32, tie_embeddings: false}
    tokenizer: {vocab_size: 32000}
    train: {max_steps: 10, max_tokens: 512}
  sft: {kind: sft, data: demonstrations, train: {epochs: 2, global_batch_size: 16}}
  dpo: {kind: dpo, policy: sft, reference: sft, data: preferences, train: {validation: {fraction: 0.2}}}
  best: {kind: compare, candidates: [base, sft, dpo], baseline: sft, prompts: heldout, scorers: [film-reviews]}
"""

ROWS = "{}\n" * 100 + "\n\n"


def plan_of(graph: Graph, **options: object) -> dict[str, PlanRow]:
    plan = make_plan(graph, lambda fingerprint: False, compute_bytes=2, **options)
    return {row.stage: row for row in plan.rows}


def shown(plan: Plan) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(plan_table(plan))
    return out.getvalue()


# --- numbers -----------------------------------------------------------------------------------------------------


def test_a_7b_recipe_has_the_published_figures(check: Check) -> None:
    rows = plan_of(check(SEVEN, rows=ROWS))
    base, sft, dpo, best = rows.values()
    parameters, adapter = 6_738_415_616, 39_976_960

    assert base.memory["trained weights"] == 4 * parameters
    assert base.disk == 4 * parameters
    assert sft.memory["base"] / GIB == pytest.approx(3.600, abs=5e-4)
    assert sft.memory["trained weights"] == 4 * adapter
    assert sft.memory["optimizer"] == 8 * adapter
    assert "frozen adapters" not in sft.memory
    assert dpo.memory["frozen adapters"] == 4 * adapter
    assert dpo.memory["base"] == sft.memory["base"]
    assert sft.disk == 4 * adapter
    assert sft.scratch == 3 * 12 * adapter, "two checkpoints are kept and the next one is written beside them"
    # The base is compared as it was trained, and again in NF4 under the two adapters.
    assert best.memory["base"] / GIB == pytest.approx(12.551 + 3.600, abs=1e-3)
    assert best.memory["frozen adapters"] == 2 * 4 * adapter
    assert best.memory["keys and values"] == 64 * 256 * GIB // 2048, "half a MiB per token"


def test_steps_are_those_of_the_schedule(check: Check) -> None:
    from align.spec.train import TrainSettings
    from align.training.schedule import Schedule

    rows = plan_of(check(SEVEN, rows=ROWS))
    assert (rows["base"].steps, rows["base"].at_most) == (10, False)
    assert (rows["sft"].steps, rows["sft"].at_most) == (14, True)
    assert rows["sft"].steps == Schedule.of(TrainSettings(epochs=2, global_batch_size=16), 100).total_steps
    assert rows["dpo"].steps == 5, "a fifth of 100 pairs is held out"
    assert rows["best"].steps is None


def test_a_pack_is_never_larger_than_a_ranks_share_of_a_step(check: Check) -> None:
    def activations(*overrides: str) -> int:
        large = "stages.sft.train.pack_tokens=8192"
        return plan_of(check(SEVEN, large, *overrides))["sft"].memory["activations"]

    full = activations()  # 16 x 1024 tokens in packs of 8192
    assert activations("stages.sft.train.global_batch_size=8") == full
    assert activations("stages.sft.train.global_batch_size=4") == full // 2
    assert activations("launch.processes=4") == full // 2
    assert activations("stages.sft.train.pack_tokens=2048") == full // 4
    assert activations("stages.sft.train.pack_tokens=1") == full // 8, "an example is never cut"
    assert activations("stages.sft.model={gradient_checkpointing: true}") < full // 10


@pytest.mark.parametrize(("dtype", "bytes_"), [("auto", 2), ("bfloat16", 2), ("float32", 4)])
def test_the_compute_dtype_sizes_what_is_not_quantised(check: Check, dtype: str, bytes_: int) -> None:
    row = plan_of(check(SEVEN, f"model.dtype={dtype}", "model.quantization=none"))["sft"]
    assert row.memory["base"] == bytes_ * 6_738_415_616


def test_deepspeed_divides_what_its_stage_divides(check: Check) -> None:
    def row(deepspeed: str) -> PlanRow:
        return plan_of(check(SEVEN, f"stages.dpo.launch={{deepspeed: {deepspeed}, processes: 2}}"))["dpo"]

    zero2, zero3 = row("zero2"), row("zero3")
    assert zero3.memory["base"] == zero2.memory["base"] // 2
    assert zero3.memory["frozen adapters"] == zero2.memory["frozen adapters"] // 2
    assert zero3.memory["optimizer"] == zero2.memory["optimizer"]
    assert (zero2.disk, zero3.disk) == (2 * 39_976_960, 2 * 39_976_960)


# --- states ------------------------------------------------------------------------------------------------------


def test_a_stage_is_reused_resumed_or_run(check: Check, tmp_path: Path) -> None:
    from align.artifacts.manifest import Manifest
    from align.artifacts.seal import publish
    from align.artifacts.store import Store

    graph = check(SEVEN, rows=ROWS)
    store = Store(tmp_path / "home")
    prints = {name: node.fingerprint for name, node in graph.nodes.items()}
    store.add(
        Manifest(kind="pretrain", stage="base", recipe="r", fingerprint=prints["base"]), store.temporary(prints["base"])
    )
    for step in (100, 200):
        staged = store.temporary(prints["sft"])
        (staged / "weights").write_text("w")
        folder = store.work(prints["sft"]) / "checkpoints"
        folder.mkdir(exist_ok=True)
        publish(staged, folder / f"step-{step:06d}")
    (store.work(prints["dpo"]) / "checkpoints" / "step-000300").mkdir(parents=True)  # never sealed

    plan = make_plan(graph, lambda each: store.find(each) is not None, store.resumes_at)
    assert [(row.stage, row.state, row.resume_step) for row in plan.rows] == [
        ("base", "reuse", 0),
        ("sft", "resume", 200),
        ("dpo", "run", 0),
        ("best", "run", 0),
    ]
    assert plan.rows[0].total_memory is None, "what is reused takes nothing"
    text = shown(plan)
    assert "resume at 200" in text
    assert "reuse" in text


def test_disk_is_all_new_artifacts_and_the_largest_set_of_checkpoints(check: Check) -> None:
    plan = make_plan(check(SEVEN), lambda fingerprint: False)
    assert plan.disk_needed == sum(row.disk or 0 for row in plan.rows) + plan.rows[0].scratch
    assert make_plan(check(SEVEN), lambda fingerprint: True).disk_needed == 0


def test_the_peer_keeps_no_checkpoints(check: Check) -> None:
    text = FULL.replace("REFERENCE", "sft")
    ours, peers = (plan_of(check(text, f"stages.sft.engine={engine}"))["sft"] for engine in ("align", "trl"))
    assert ours.scratch > peers.scratch == 0
    assert ours.disk == peers.disk
    assert ours.notes == ()
    assert peers.notes[0].startswith("trained by TRL: no checkpoints")


# --- notes -------------------------------------------------------------------------------------------------------

FULL = """
name: full
model: {base: base, adapter: none}
data:
  corpus: {generator: film-reviews, part: corpus, rows: 100, format: prompt_completion}
  preferences: {generator: film-reviews, part: preferences, rows: 100, format: pairs}
stages:
  base: {kind: pretrain, data: corpus, train: {max_tokens: 512}}
  sft: {kind: sft, data: corpus, train: {max_tokens: 512}}
  dpo: {kind: dpo, policy: sft, reference: REFERENCE, data: preferences, train: {max_tokens: 512}}
"""


@pytest.mark.parametrize(("reference", "told"), [("sft", False), ("base", True)])
def test_a_foreign_reference_of_a_full_model_is_a_second_copy(check: Check, reference: str, told: bool) -> None:
    note = " ".join(plan_of(check(FULL.replace("REFERENCE", reference)))["dpo"].notes)
    assert ("second copy" in note) == told
    assert (reference in note) == told


def test_a_full_policy_straight_on_the_base_shares_it_with_its_reference(check: Check) -> None:
    rows = plan_of(check(FULL.replace("policy: sft, reference: REFERENCE", "reference: base")))
    assert rows["dpo"].notes == ()


def test_merging_and_long_texts_are_told(check: Check) -> None:
    rows = plan_of(check(SEVEN, "stages.dpo.model={merge_parent: true}", "stages.base.train.max_tokens=1600"))
    assert rows["dpo"].notes[0].startswith("merging takes 25.10 GiB")
    assert rows["dpo"].disk == 4 * 39_976_960 + 2 * 6_738_415_616
    assert rows["base"].notes == ("max_tokens 1600 is more than the 1024 positions the model was made for",)


def test_a_model_that_is_not_here_is_said_to_be_unknown(check: Check) -> None:
    text = SEVEN.replace("model: {base: base,", "model: {base: nobody/nothing-here, revision: " + "a" * 40 + ",")
    rows = plan_of(check(text.replace("candidates: [base, sft, dpo]", "candidates: [sft, dpo]")))
    assert rows["sft"].total_memory is None
    assert rows["sft"].disk is None
    assert rows["sft"].notes == ("the size and the packing of nobody/nothing-here are known once it is downloaded",)
    assert rows["best"].notes == ("the size of nobody/nothing-here is known once it is downloaded",)


def test_a_folder_is_sized_by_its_headers(check: Check, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "llm")
    rows = plan_of(check(SEVEN, "model.base=llm", "model.quantization=none"))
    assert rows["sft"].memory["base"] == 2 * sum(p.numel() for p in model.parameters())
    assert rows["base"].memory["trained weights"] == 4 * 6_738_415_616


# --- rows --------------------------------------------------------------------------------------------------------

FILES = {
    "jsonl": ("rows.jsonl", b'{"a": 1}\n\n  \n{"a": 2}\nnot json\n{"a": 3}', 4),
    "jsonl.gz": ("rows.jsonl.gz", gzip.compress(b"{}\n{}\n"), 2),
    "ndjson": ("rows.ndjson", b"{}\n", 1),
    "json list": ("rows.json", b"[{}, {}, {}]", 3),
    "json with one list": ("rows.json", b'{"version": 1, "data": [{}, {}]}', 2),
    "json with two lists": ("rows.json", b'{"a": [], "b": []}', None),
    "json that is none": ("rows.json", b"[{}, ", None),
    "csv": ("rows.csv", b'a,b\n1,"two\nlines"\n\n3,4\n', 2),
    "tsv": ("rows.tsv", b'a\tb\n1\t"2\n3\t4\n', 2),
    "empty": ("rows.jsonl", b"", 0),
    "cut gzip": ("rows.jsonl.gz", gzip.compress(b"{}\n" * 1000)[:-20], None),
    "parquet": ("rows.parquet", b"PAR1", None),
}


@pytest.mark.parametrize("kind", FILES)
def test_rows_are_counted_where_that_is_cheap(kind: str, tmp_path: Path) -> None:
    name, content, expected = FILES[kind]
    (tmp_path / name).write_bytes(content)
    assert count_rows(FileData(path=name, format="alpaca"), tmp_path) == expected


@pytest.mark.parametrize("kind", [kind for kind, (_, _, rows) in FILES.items() if rows])
def test_the_count_is_what_the_reader_reads(kind: str, tmp_path: Path) -> None:
    from align.data.sources import read_rows

    name, content, expected = FILES[kind]
    (tmp_path / name).write_bytes(content)
    assert len(list(read_rows(FileData(path=name, format="alpaca"), tmp_path))) == expected


def test_skip_and_limit_count(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n" * 10)

    def count(**settings: int) -> int | None:
        return count_rows(FileData(path="rows.jsonl", format="alpaca", **settings), tmp_path)

    assert (count(skip=3), count(limit=4), count(skip=8, limit=4), count(skip=20)) == (7, 4, 2, 0)
    made = GeneratedData(generator="g", part="p", rows=50, skip=10, limit=20, format="pairs")
    assert count_rows(made, tmp_path) == 20
    assert count_rows(HubData(hub="a/b", format="pairs", limit=5), tmp_path) is None


def test_large_files_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "rows.jsonl").open("wb") as file:
        file.truncate(10 * GIB)
    assert count_rows(FileData(path="rows.jsonl", format="alpaca"), tmp_path) is None


def test_unknown_rows_are_said_to_be_unknown(check: Check, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    graph = check(SEVEN, "data.demonstrations.path=rows.parquet")
    assert plan_of(graph)["sft"].steps is None
    assert "known after data is read" in shown(make_plan(graph, lambda fingerprint: False))


# --- shipped -----------------------------------------------------------------------------------------------------


def test_shipped_recipes_plan_in_a_moment(
    repository: Path, align_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setenv("ALIGN_DATA", str(align_data))
    paths = sorted((repository / "recipes").rglob("*.yaml"))
    assert paths
    for path in paths:
        graph = build_graph(load_recipe(path), tmp_path)
        began = time.monotonic()
        plan = make_plan(graph, lambda fingerprint: False)
        assert time.monotonic() - began < 10
        assert {row.stage for row in plan.rows} == set(graph.nodes)
        assert all(row.total_memory or row.notes for row in plan.rows)
        json.dumps([row.memory for row in plan.rows])
