"""`engine: trl` against `engine: align`: the same curve, the same artifact, and what TRL cannot do is said."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from align.data.chat import Example
from align.errors import DataError, LaunchError, RecipeError, TrainingError
from align.recipe.packing import TRL
from align.stages.peer.feed import EpochOrder, micro_batch, padding_id
from align.stages.peer.trainer import import_trl
from align.training.schedule import Schedule
from align.types import Batch
from bench.loss_curves import FULL, RECIPE, TOLERANCE, Curve, curve, largest
from tests.training.worlds import random_examples

pytest.importorskip("trl", reason="TRL is an extra: pip install align[trl]")

SHORT = (
    "stages.base.train.max_steps=10",
    "stages.parent.train.max_steps=8",
    "data.demonstrations.rows=43",
    "data.preferences.rows=43",
    "data.labels.rows=21",
)
FAR = ("stages.dpo.beta=1.0", "stages.dpo.train.max_steps=4")
BF16 = ("model.quantization=none", "model.dtype=bfloat16")
MODELS = pytest.mark.parametrize("model", [(), FULL], ids=["nf4", "full"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe of the benchmark; the store in it keeps what several tests start from."""
    folder = tmp_path_factory.mktemp("peer")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def run(world: Path, name: str, *overrides: str) -> tuple[Curve, Path]:
    return curve(world / "recipe.yaml", name, world / "home", *SHORT, *overrides)


def pair(world: Path, name: str, *overrides: str) -> tuple[tuple[Curve, Path], tuple[Curve, Path]]:
    """Curve and artifact under align and under TRL."""
    return run(world, name, *overrides), run(world, name, *overrides, f"stages.{name}.engine=trl")


def short(name: str) -> tuple[str, ...]:
    """Two epochs of 43 examples in steps of 8 and passes of 2; an epoch's last step has a pass of 2 and one of 1."""
    return (f"stages.{name}.train.max_steps=12", f"stages.{name}.train.pack_tokens=500")


@MODELS
def test_sft_gives_the_same_losses(world: Path, model: tuple[str, ...]) -> None:
    (ours, _), (peers, _) = pair(world, "sft", *short("sft"), *model)
    assert len(ours.of()) == 12
    assert largest(ours.of(), peers.of()) < TOLERANCE["sft"]
    assert ours.of("grad_norm") == pytest.approx(peers.of("grad_norm"), rel=1e-3)
    assert ours.of("learning_rate") == peers.of("learning_rate")
    assert ours.of()[0] - ours.of()[-1] > 100 * TOLERANCE["sft"], "curves that stay where they are show nothing"


def test_sft_in_bf16_stays_within_its_noise(world: Path) -> None:
    (ours, _), (peers, _) = pair(world, "sft", *short("sft"), *BF16)
    assert largest(ours.of(), peers.of()) < 5e-3


@MODELS
@pytest.mark.parametrize("name", ["sft", "reward"])
def test_the_artifact_is_one_of_aligns(world: Path, name: str, model: tuple[str, ...]) -> None:
    (_, ours), (_, peers) = pair(world, name, *short(name), *model)
    files = lambda folder: {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}  # noqa: E731
    assert files(ours) == files(peers)
    for file in files(ours):
        if file.endswith(".safetensors"):
            mine, theirs = load_file(ours / file), load_file(peers / file)
            assert {k: t.dtype for k, t in mine.items()} == {k: t.dtype for k, t in theirs.items()}
            assert max((mine[k] - theirs[k]).abs().max().item() for k in mine) < 1e-3
        elif "/" in file:  # configurations, tokenizer, chat template
            assert (ours / file).read_bytes() == (peers / file).read_bytes(), file
    manifest = json.loads((peers / "manifest.json").read_text())
    assert manifest["settings"]["engine"] == "trl"
    assert manifest["steps"] == 12
    assert manifest["packing"] == asdict(TRL)
    made = {"sft": "policy", "reward": "reward"}[name]
    record = json.loads((ours / "manifest.json").read_text())[made]
    assert manifest[made] == record | {"base": manifest["fingerprint"] if model else record["base"]}
    assert "engine: trl" in (peers / "README.md").read_text()


@MODELS
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_preferences_give_the_same_losses_and_rewards(world: Path, name: str, model: tuple[str, ...]) -> None:
    """KTO's KL term too: TRL is handed align's mismatched completions, and a whole step in one pass."""
    (ours, _), (peers, _) = pair(world, name, *short(name), *model)
    assert ours.of()[0] == pytest.approx({"dpo": math.log(2), "kto": 0.5 * (1.2 + 1) / 2}[name], abs=0.06)
    assert largest(ours.of(), peers.of()) < TOLERANCE[name]
    assert ours.of("grad_norm") == pytest.approx(peers.of("grad_norm"), rel=1e-2)
    assert ours.of("learning_rate") == peers.of("learning_rate")
    uneven = {5, 11}  # TRL logs the mean over passes; those of an epoch's last step are not of one size
    for metric in ("rewards/chosen", "logps/rejected", {"dpo": "rewards/margin", "kto": "kl"}[name]):
        values = zip(ours.of(metric), peers.of(metric), strict=True)
        even = [pair for step, pair in enumerate(values) if step not in uneven or name == "kto"]
        assert [a for a, _ in even] == pytest.approx([b for _, b in even], abs=1e-2, rel=1e-3), metric
    assert max(map(abs, ours.of("rewards/chosen"))) > 0.1, "rewards that stay at 0 show nothing"
    assert ours.lines[-1].keys() - peers.lines[-1].keys() == {"tokens_per_second"}


@MODELS
def test_a_reward_model_is_the_same(world: Path, model: tuple[str, ...]) -> None:
    (ours, folder), (peers, other) = pair(world, "reward", *short("reward"), *model)
    assert largest(ours.of(), peers.of()) < TOLERANCE["reward"]
    assert ours.of("grad_norm") == pytest.approx(peers.of("grad_norm"), rel=1e-3)
    assert ours.of("rewards/margin")[2] == pytest.approx(peers.of("rewards/margin")[2], abs=1e-3)
    for file in ("evaluation.json", "normalization.json"):
        mine, theirs = (json.loads((each / file).read_text()) for each in (folder, other))
        assert mine.keys() == theirs.keys()
    assert mine["mean"] == pytest.approx(theirs["mean"], abs=1e-3)
    assert mine["std"] == pytest.approx(theirs["std"], rel=1e-3)


def test_a_margin_counts_in_both(world: Path) -> None:
    wanted = ("stages.reward.train.max_steps=3", "stages.reward.margin=score", "stages.reward.normalise=samples")
    (plain, _), (ours, _), (peers, _) = run(world, "reward", *short("reward")), *pair(world, "reward", *wanted)
    assert largest(ours.of(), peers.of()) < TOLERANCE["reward"]
    assert ours.of()[0] > plain.of()[0] + 0.1


@pytest.mark.parametrize(
    "settings",
    ["{loss: robust, label_smoothing: 0.1}", "{loss: rso}", "{reduction: token_mean, beta: 5.0}"],
)
def test_the_other_losses_of_dpo_are_the_same(world: Path, settings: str) -> None:
    wanted = (f"stages.dpo.{key}={value}" for key, value in yaml.safe_load(settings).items())
    (ours, _), (peers, _) = pair(world, "dpo", *short("dpo"), "stages.dpo.train.max_steps=4", *wanted)
    assert largest(ours.of(), peers.of()) < TOLERANCE["dpo"]
    assert abs(ours.of()[0] - ours.of()[-1]) > 100 * TOLERANCE["dpo"]


def assert_the_same_reference(ours: Curve, peers: Curve) -> None:
    """Against the policy's own start the first loss would be ln 2. With a beta of 1 the rounding of sums shows."""
    moved = abs(ours.of()[0] - math.log(2))
    assert abs(ours.of()[0] - peers.of()[0]) < moved / 50
    assert largest(ours.of(), peers.of()) < 1e-3


@MODELS
@pytest.mark.parametrize("policy", ["null", "sft"])
def test_a_reference_that_is_another_stage(world: Path, policy: str, model: tuple[str, ...]) -> None:
    wanted = (*FAR, "stages.sft.train.max_steps=4", f"stages.dpo.policy={policy}")
    (ours, _), (peers, _) = pair(world, "dpo", *wanted, *model)
    assert_the_same_reference(ours, peers)


def test_the_base_as_reference_of_an_adapter(world: Path) -> None:
    (ours, _), (peers, _) = pair(world, "dpo", *FAR, "stages.dpo.reference=base")
    assert_the_same_reference(ours, peers)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dpo", ("model.gradient_checkpointing=true",)),
        ("dpo", ("stages.dpo.model={merge_parent: true}",)),
        ("reward", ("model.gradient_checkpointing=true", *FULL)),
        ("sft", ("stages.sft.policy={adapter: ADAPTER}",)),
    ],
    ids=["checkpointing", "merged parent", "checkpointing in full", "an adapter made elsewhere"],
)
def test_other_ways_to_start(world: Path, name: str, settings: tuple[str, ...]) -> None:
    _, parent = run(world, "parent")
    wanted = (each.replace("ADAPTER", str(parent / "adapter")) for each in settings)
    (ours, _), (peers, other) = pair(world, name, *wanted, f"stages.{name}.train.max_steps=4")
    assert largest(ours.of(), peers.of()) < TOLERANCE[name]
    assert ours.of("grad_norm") == pytest.approx(peers.of("grad_norm"), rel=1e-2)
    assert (other / "model").exists() == ("merge_parent" in settings[0] or "model.adapter=none" in settings)


def test_validation_is_told_under_the_same_name(world: Path) -> None:
    wanted = (*short("sft"), "stages.sft.train.validation={every_steps: 6, fraction: 0.2}")
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "eval_loss" in line]
        for _, folder in pair(world, "sft", *wanted)
    ]
    assert [[line["step"] for line in each] for each in lines] == [[6, 12], [6, 12]]
    # TRL takes the mean over held-out batches, align over all tokens.
    assert lines[0][-1]["eval_loss"] == pytest.approx(lines[1][-1]["eval_loss"], abs=0.05)


def kill_after(steps: int, works: Path, done: set[Path]) -> None:
    """Send SIGTERM to this process once a stage that is not among `done` has logged so many steps."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        logs = [path.read_text() for path in works.glob("*/metrics.jsonl") if path not in done]
        if any(log.count("\n") >= steps for log in logs):
            break
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_stops_at_a_step_and_the_stage_starts_again(world: Path) -> None:
    run(world, "parent")
    works = world / "home" / "work"
    done, handler = set(works.glob("*/metrics.jsonl")), signal.getsignal(signal.SIGTERM)
    for _ in range(2):
        for log in set(works.glob("*/metrics.jsonl")) - done:
            log.write_text("")
        killer = threading.Thread(target=kill_after, args=(3, works, done))
        killer.start()
        with pytest.raises(TrainingError, match="stopped by a signal after step") as told:
            run(world, "sft", "stages.sft.train.max_steps=5000", "stages.sft.engine=trl")
        killer.join()
        assert "starts from its beginning" in str(told.value)
    (log,) = set(works.glob("*/metrics.jsonl")) - done
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert 3 <= len(steps) < 5000
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_number_that_is_not_finite_stops_it_with_the_rows(world: Path) -> None:
    with pytest.raises(TrainingError, match=r"of step \d+ is not finite under engine: trl. Rows of the data .*\[\d+"):
        run(world, "sft", *FULL, "stages.sft.engine=trl", "stages.sft.train.learning_rate=1e30")


def test_rows_with_weights_are_refused(world: Path) -> None:
    row = {"prompt": "say it", "completion": "said", "weight": 2.0}
    (world / "weighted.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="row 1 has weight 2, and TRL"):
        run(world, "sft", "stages.sft.engine=trl", "stages.sft.data=weighted",
            "data.weighted={path: weighted.jsonl, format: prompt_completion}")  # fmt: skip


def test_lists_are_refused_where_pairs_are_wanted(world: Path) -> None:
    row = {"prompt": "say it", "responses": ["one", "two", "three"], "scores": [1, 2, 3]}
    (world / "ranked.jsonl").write_text(json.dumps(row) + "\n")
    lists = ("stages.reward.data=lists", "data.lists={path: ranked.jsonl, format: ranked}")
    with pytest.raises(RecipeError, match="knows pairs alone"):
        run(world, "reward", "stages.reward.engine=trl", *lists)
    pairs = (lists[0], "data.lists={path: ranked.jsonl, format: ranked, convert: all_pairs}")
    curves = pair(world, "reward", *pairs, "stages.reward.train.max_steps=2")
    assert largest(curves[0][0].of(), curves[1][0].of()) < TOLERANCE["reward"]


def test_padding_ends_no_row_of_a_reward_model() -> None:
    """Its classifier would take a last token with the id of padding for padding."""
    examples = random_examples(4, 2)
    last = [c.ids[-1] for e in examples for c in e.completions]
    assert padding_id(Batch.RANKED, examples, last[0], 300) not in last
    assert padding_id(Batch.RANKED, examples, 299, 300) == 299
    assert padding_id(Batch.PAIRED, examples, last[0], 300) == last[0]


def test_a_missing_trl_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(LaunchError, match="needs TRL") as told:
        import_trl()
    assert told.value.exit_code == 4
    assert "pip install 'align[trl]'" in str(told.value)


def test_the_order_is_that_of_the_schedule_in_every_epoch() -> None:
    schedule = Schedule(examples=10, batch=4, total_steps=6, seed=3)
    order = EpochOrder(schedule)
    for epoch in range(2):
        order.set_epoch(epoch)
        assert list(order) == [i for step in range(3 * epoch, 3 * epoch + 3) for i in schedule.indices(step)]


@pytest.mark.parametrize(
    ("kind", "pack_tokens", "expected"),
    [(Batch.TOKENS, 10_000, 12), (Batch.TOKENS, 200, 4), (Batch.PAIRED, 200, 2), (Batch.TOKENS, 1, 1),
     (Batch.UNPAIRED, 1, 12)],
)  # fmt: skip
def test_a_pass_holds_as_many_examples_as_fit_and_divide_the_batch(
    kind: Batch, pack_tokens: int, expected: int
) -> None:
    examples: list[Example] = random_examples(40, 2, longest=24)
    assert 40 < max(len(e.prompt_ids) + max(len(c.ids) for c in e.completions) for e in examples) < 50
    assert micro_batch(kind, examples, 12, pack_tokens) == expected
