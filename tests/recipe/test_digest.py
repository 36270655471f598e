"""What changes a fingerprint and what does not."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from align.errors import DataError, RecipeError
from align.recipe import Graph, build_graph, load_recipe
from align.recipe.digest import Digests
from align.spec.train import TrainSettings

Check = Callable[..., Graph]

FOLDER = Path(__file__).parent / "golden"
GOLDEN = Path(__file__).parents[1] / "golden" / "fingerprints.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

HEAD = """\
name: demo
model: {base: base, quantization: nf4, adapter: {targets: [q_proj, v_proj]}}
data:
  corpus: {generator: film-reviews, part: corpus, rows: 8, format: prompt_completion}
  rows: {path: rows.jsonl, format: alpaca}
  pairs: {path: pairs.jsonl, format: pairs}
"""
STAGES = """\
stages:
  base: {kind: pretrain, data: corpus}
  sft: {kind: sft, data: rows}
  dpo: {kind: dpo, policy: sft, reference: sft, data: pairs}
  last: {kind: compare, candidates: [sft, dpo], baseline: sft, prompts: rows}
"""
RECIPE = HEAD + STAGES


def prints(graph: Graph) -> dict[str, str]:
    return {name: node.fingerprint for name, node in graph.nodes.items()}


def changed(before: Graph, after: Graph) -> list[str]:
    first, second = prints(before), prints(after)
    return [name for name in first if first[name] != second[name]]


def test_golden_fingerprints(tmp_path: Path) -> None:
    """A change here makes every stored result of every user unknown: only together with a reason to make them anew.

    ``python -c "from tests.recipe.test_digest import write_golden; write_golden()"`` writes the file.
    """
    assert json.loads(GOLDEN.read_text()) == golden(tmp_path)


def golden(home: Path) -> dict[str, dict[str, str]]:
    return {path.stem: prints(build_graph(load_recipe(path), home)) for path in sorted(FOLDER.glob("*.yaml"))}


def write_golden() -> None:
    GOLDEN.write_text(json.dumps(golden(Path(tempfile.mkdtemp())), indent=1) + "\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: demo", "name: other\ndescription: Another name."),
        ("data: rows}", "data: rows, reduction: token_mean, loss_on: completion}"),
        ("data: rows}", "data: rows, train: {learning_rate: 1e-4, warmup_ratio: 0.03}}"),
        ("data: rows}", "data: rows, train: {learning_rate: 0.0001}}"),
        (
            "data: rows}",
            "data: rows, train: {pack_tokens: 64, log_every_steps: 1, save_every_steps: 1, keep_checkpoints: 9}}",
        ),
        ("data: rows}", "data: rows, launch: {processes: 4, deepspeed: zero2}}"),
        ("data: rows}", "data: rows, model: {quantization: nf4, gradient_checkpointing: true}}"),
        ("quantization: nf4", "quantization: nf4, dtype: auto, gradient_checkpointing: true, merge_parent: false"),
        ("adapter: {targets", "adapter: {kind: lora, rank: 16, dropout: 0, targets"),
        ("[q_proj, v_proj]", "[v_proj, q_proj]"),
        ("prompts: rows}", "prompts: rows, generation: {batch_size: 1}, show: 1}"),
        ("stages:\n", "launch: {processes: 3}\nlogging: {report_to: [tensorboard]}\nstages:\n"),
    ],
)
def test_what_cannot_change_a_result_is_left_out(check: Check, old: str, new: str) -> None:
    assert old in RECIPE
    assert changed(check(RECIPE), check(RECIPE.replace(old, new, 1))) == []


SFT_ON = ["sft", "dpo", "last"]


@pytest.mark.parametrize(
    ("old", "new", "stages"),
    [
        ("rows: 8", "rows: 9", ["base", *SFT_ON]),
        ("rows: 8", "rows: 8, seed: 1", ["base", *SFT_ON]),
        ("{kind: pretrain,", "{kind: pretrain, architecture: {layers: 2},", ["base", *SFT_ON]),
        ("quantization: nf4", "quantization: int8", SFT_ON),
        ("[q_proj, v_proj]", "[q_proj]", SFT_ON),
        ("rows.jsonl, format: alpaca", "rows.jsonl, format: alpaca, limit: 3", SFT_ON),
        ("data: rows}", "data: rows, train: {seed: 1}}", SFT_ON),
        ("data: rows}", "data: rows, reduction: sequence_mean}", SFT_ON),
        ("data: rows}", "data: rows, engine: trl}", SFT_ON),
        ("format: pairs", "format: pairs, columns: {chosen: good}", ["dpo", "last"]),
        ("data: pairs}", "data: pairs, beta: 0.2}", ["dpo", "last"]),
        ("data: pairs}", "data: pairs, model: {dtype: bfloat16}}", ["dpo", "last"]),
        ("reference: sft", "reference: base", ["dpo", "last"]),
        ("prompts: rows", "prompts: rows, resamples: 10", ["last"]),
        ("baseline: sft", "baseline: dpo", ["last"]),
        ("prompts: rows", "prompts: rows, scorers: [film-reviews]", ["last"]),
    ],
)
def test_what_can_change_a_result_changes_it_and_all_that_follows(
    check: Check, old: str, new: str, stages: list[str]
) -> None:
    assert old in RECIPE
    assert changed(check(RECIPE), check(RECIPE.replace(old, new, 1))) == stages


RENAMED = """\
name: other
model: {base: root, quantization: nf4, adapter: {targets: [q_proj, v_proj]}}
data:
  votes: {path: pairs.jsonl, format: pairs}
  talks: {path: rows.jsonl, format: alpaca}
  texts: {generator: film-reviews, part: corpus, rows: 8, format: prompt_completion}
stages:
  last: {kind: compare, candidates: [tuned, preferred], baseline: tuned, prompts: talks}
  preferred: {kind: dpo, policy: tuned, reference: tuned, data: votes}
  root: {kind: pretrain, data: texts}
  tuned: {kind: sft, data: talks}
"""


def test_names_and_order_are_not_part_of_what_is_trained_but_names_are_of_what_is_shown(check: Check) -> None:
    before, after = prints(check(RECIPE)), prints(check(RENAMED))
    for old, new in (("base", "root"), ("sft", "tuned"), ("dpo", "preferred")):
        assert before[old] == after[new]
    assert before["last"] != after["last"]


def test_a_setting_says_the_same_in_the_recipe_and_in_the_stage(check: Check) -> None:
    moved = RECIPE.replace("data: rows}", "data: rows, model: {dtype: float32}}")
    moved = moved.replace("data: pairs}", "data: pairs, model: {dtype: float32}}")
    assert changed(check(RECIPE.replace("nf4,", "nf4, dtype: float32,")), check(moved)) == []


def test_a_file_counts_by_its_content_and_the_way_it_is_read(check: Check, tmp_path: Path) -> None:
    before = check(RECIPE)
    assert changed(before, check(RECIPE, rows="{}\n{}\n")) == SFT_ON
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "elsewhere" / "votes.jsonl")
    assert changed(before, check(RECIPE.replace("pairs.jsonl", "elsewhere/votes.jsonl"))) == []
    shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "pairs.csv")
    assert changed(before, check(RECIPE.replace("pairs.jsonl", "pairs.csv"))) == ["dpo", "last"]


def test_a_recipe_gives_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = golden(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert golden(tmp_path / "b") == before


COSMETIC = {"pack_tokens": 64, "packing": "rows", "log_every_steps": 3, "save_every_steps": 3, "keep_checkpoints": 3}
COUNTS = {
    "epochs": 2.5,
    "max_steps": 3,
    "global_batch_size": 3,
    "learning_rate": 0.5,
    "lr_scheduler": "linear",
    "warmup_ratio": 0.5,
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "max_grad_norm": 0.5,
    "max_tokens": 3,
    "seed": 3,
    "validation": "{fraction: 0.5}",
}


def test_every_training_setting_is_cosmetic_or_counts(check: Check) -> None:
    assert set(COSMETIC) | set(COUNTS) == set(TrainSettings.model_fields), (
        "decide whether the new one can change a result"
    )
    before = check(RECIPE)
    for field, value in (COSMETIC | COUNTS).items():
        after = check(RECIPE, f"stages.sft.train.{field}={value}")
        assert changed(before, after) == ([] if field in COSMETIC else SFT_ON), field


def test_a_folder_counts_by_its_model_files(tmp_path: Path) -> None:
    digests = Digests(tmp_path / "home")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = digests.folder(folder)
    (folder / "README.md").write_text("words")
    assert digests.folder(folder) == first
    (folder / "model.safetensors").write_bytes(b"weights")
    second = digests.folder(folder)
    assert second != first
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert digests.folder(folder) != second


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    home, path = tmp_path / "home", tmp_path / "rows.jsonl"
    path.write_text("one")
    os.utime(path, ns=(10**18, 10**18))
    digests = Digests(home)
    first = digests.file(path)
    digests.save()
    # Same size and time: the memo answers, the content is not read.
    path.write_text("two")
    os.utime(path, ns=(10**18, 10**18))
    assert Digests(home).file(path) == first
    os.utime(path, ns=(10**18, 10**18 + 1))
    assert Digests(home).file(path) != first


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    home, path = tmp_path / "home", tmp_path / "rows.jsonl"
    path.write_text("one")
    now = path.stat().st_mtime_ns
    digests = Digests(home)
    first = digests.file(path)
    digests.save()
    path.write_text("two")
    os.utime(path, ns=(now, now))
    assert Digests(home).file(path) != first


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", '{"x": 3}', "\udcff"])
def test_a_damaged_memo_only_costs_time(tmp_path: Path, content: str) -> None:
    (tmp_path / "digests.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    (tmp_path / "x").write_text("y")
    assert len(Digests(tmp_path).file(tmp_path / "x")) == 64


def test_a_home_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file, not a folder")
    path = tmp_path / "x"
    path.write_text("y")
    os.utime(path, ns=(10**18, 10**18))
    digests = Digests(tmp_path / "home")
    digests.file(path)
    digests.save()
    assert (tmp_path / "home").read_text() == "a file, not a folder"


def test_an_unreadable_file_is_an_error_of_the_data(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(RECIPE)

    def fail(self: Digests, path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Digests, "file", fail)
    with pytest.raises(
        DataError, match=r"recipe.yaml:5: data.rows.path: .*rows.jsonl cannot be read: Permission denied"
    ):
        check(RECIPE)


HUB = """\
name: demo
model: {base: someone/model, revision: REV}
data:
  rows: {hub: someone/rows, format: alpaca, revision: REV}
stages:
  sft: {kind: sft, data: rows}
"""


def test_a_commit_is_taken_as_it_is(check: Check) -> None:
    graph = check(HUB.replace("REV", COMMIT))
    assert graph.unresolved == {}
    assert changed(graph, check(HUB.replace("REV", COMMIT[::-1]))) == ["sft"]


def test_an_adapter_counts_by_its_commit(check: Check) -> None:
    text = HUB.replace("REV", COMMIT).replace("data: rows}", "data: rows, policy: {adapter: someone/adapter, AT}}")
    graph = check(text.replace("AT", f"revision: {COMMIT}"))
    assert graph.unresolved == {}
    assert changed(graph, check(text.replace("AT", f"revision: {COMMIT[::-1]}"))) == ["sft"]


def test_a_branch_is_looked_up_in_the_cache_when_there_is_no_network(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    text = HUB.replace(", revision: REV", "")
    unknown = check(text)
    assert set(unknown.unresolved) == {"someone/model@main", "someone/rows@main"}
    assert all("offline" in reason.lower() for reason in unknown.unresolved.values())
    for repo in ("models--someone--model", "datasets--someone--rows"):
        refs = tmp_path / "hub" / repo / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text(COMMIT)
    known = check(text)
    assert known.unresolved == {}
    assert prints(known) == prints(check(HUB.replace("REV", COMMIT)))
    assert changed(unknown, known) == ["sft"]


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does: a commit for someone/*, no such repository for others."""

    def do_GET(self) -> None:
        known = "/someone/" in self.path and "nowhere" not in self.path
        body = json.dumps({"id": "someone/x", "sha": COMMIT} if known else {"error": "Repository not found"}).encode()
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "RevisionNotFound" if "nowhere" in self.path else "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub on this machine."""
    from huggingface_hub import close_session, constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield
    close_session()
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_for_the_commit_of_a_branch(check: Check, hub: None) -> None:
    graph = check(HUB.replace("revision: REV", "revision: v1"))
    assert graph.unresolved == {}
    assert prints(graph) == prints(check(HUB.replace("REV", COMMIT)))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("someone/model", "nobody/model", "2: model.base: the Hub has no model `nobody/model` at v1"),
        ("someone/rows", "nobody/rows", "4: data.rows.hub: the Hub has no dataset `nobody/rows` at v1"),
        ("someone/model, revision: v1", "someone/model, revision: nowhere", "2: model.base: the Hub has no model"),
    ],
)
def test_what_the_hub_does_not_have_is_an_error(check: Check, hub: None, old: str, new: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(HUB.replace("REV", "v1").replace(old, new))
    assert f"recipe.yaml:{told}" in str(caught.value)


def test_a_name_that_the_hub_does_not_take_is_an_error(check: Check) -> None:
    text = HUB.replace(", revision: REV", "").replace("someone/rows", "a/b/c")
    with pytest.raises(RecipeError, match=r"recipe.yaml:4: data.rows.hub: the Hub has no dataset `a/b/c`"):
        check(text)
