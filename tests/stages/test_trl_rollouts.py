"""`engine: trl` on rollouts against `engine: align`: the same completions, and what TRL makes of them step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from align.data import PromptExample
from align.errors import RecipeError, TrainingError
from align.methods.grpo import GRPO
from align.methods.rloo import RLOO
from align.recipe.packing import TRL
from align.recipe.sources import plugins
from align.rollout import request
from align.scoring import get_scorer
from align.spec.online import RolloutStage
from align.stages.peer import online
from align.stages.peer.feed import RolloutOrder
from align.stages.peer.scores import Scores
from align.stages.peer.seats import Seats
from align.training.buffer import Buffer
from align.training.kept import KeptRollouts
from align.training.schedule import RolloutSchedule
from bench.loss_curves import FULL, RECIPE, curve

pytest.importorskip("trl", reason="TRL is an extra: pip install align[trl]")

SHORT = (
    "stages.base.train.max_steps=10",
    "stages.parent.train.max_steps=8",
    "stages.reward.train.max_steps=8",
    "data.demonstrations.rows=43",
    "data.preferences.rows=43",
)
SCORERS = '''
class Vowels:
    """The share of a completion's characters that are an e, in tens of percent: a policy can learn that."""

    def score(self, prompt, completion):
        return 10.0 * completion.count("e") / max(len(completion), 1)


class Letters:
    label = "wanted"
    reads = ("letters",)

    def score(self, prompt, completion, *, letters):
        return sum(completion.count(letter) for letter in letters) / 10


class Broken:
    def score(self, prompt, completion):
        return float("nan")
'''
ENTRIES = "vowels = peer_scorers:Vowels\nletters = peer_scorers:Letters\nbroken = peer_scorers:Broken\n"
QUESTIONS = "data.questions={path: questions.jsonl, format: prompts}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe of the benchmark; the store in it keeps what several tests start from."""
    folder = tmp_path_factory.mktemp("peer")
    (folder / "recipe.yaml").write_text(RECIPE)
    rows = [
        {"prompt": f"Write about {word}.", "letters": word[:2]}
        for word in ["sea", "hills", "rain", "roads", "music", "bread"]
    ]
    (folder / "own.py").write_text("def hush(prompt, completion):\n    return -len(completion) / 50\n")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def house_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "peer_scorers.py").write_text(SCORERS)
    info = tmp_path / "peer_scorers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peer-scorers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[align.scorers]\n{ENTRIES}")
    monkeypatch.syspath_prepend(tmp_path)
    plugins.cache_clear()
    yield
    plugins.cache_clear()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Buffer]:
    """Every rollout that a stage shows from now on."""
    found: list[Buffer] = []
    own = KeptRollouts.show

    def show(self: KeptRollouts, buffer: Buffer) -> None:
        found.append(buffer)
        own(self, buffer)

    monkeypatch.setattr(KeptRollouts, "show", show)
    return found


class Ran:
    """One engine's run of a stage."""

    def __init__(self, world: Path, shown: list[Buffer], name: str, *overrides: str) -> None:
        del shown[:]
        self.curve, self.folder = curve(world / "recipe.yaml", name, world / "home", *SHORT, *overrides)
        self.rollouts = list(shown)
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        self.told = [line for line in map(json.loads, lines) if "rollout/number" in line]


def pair(world: Path, shown: list[Buffer], name: str, *settings: str, steps: int = 5) -> tuple[Ran, Ran]:
    """A stage under align and under TRL; a setting stands for one of the stage unless it names where it is."""
    own = [each if each.startswith(("stages.", "model.", "data.")) else f"stages.{name}.{each}" for each in settings]
    overrides = (f"stages.{name}.train.max_steps={steps}", *own)
    return (
        Ran(world, shown, name, *overrides),
        Ran(world, shown, name, *overrides, f"stages.{name}.engine=trl"),
    )


def assert_the_same_rollout(ours: Buffer, peers: Buffer, within: float = 1e-4) -> None:
    assert (ours.number, ours.step, ours.rows, ours.prompts) == (peers.number, peers.step, peers.rows, peers.prompts)
    assert ours.completions == peers.completions
    assert ours.ended == peers.ended
    assert ours.rollout.kept.tolist() == peers.rollout.kept.tolist()
    torch.testing.assert_close(ours.rollout.scores, peers.rollout.scores, atol=within, rtol=within)
    torch.testing.assert_close(ours.made.advantages, peers.made.advantages, atol=within, rtol=within)


def alike(ours: Ran, peers: Ran) -> int:
    """Rollouts with the same completions, from the first one on.

    Weights that differ by rounding may draw another token on some machine; what follows is then another run.
    """
    pairs = zip(ours.rollouts, peers.rollouts, strict=True)
    shares = [fmean(a == b for a, b in zip(x.completions, y.completions, strict=True)) for x, y in pairs]
    count = next((i for i, share in enumerate(shares) if share < 1), len(shares))
    assert count, "from the same weights everything is the same"
    assert count == len(shares) or shares[count] > 0.9, "these are other draws"
    return count


def assert_the_same_run(ours: Ran, peers: Ran) -> None:
    """Both engines from the first rollout on, as long as they learn from the same completions."""
    count = alike(ours, peers)
    for own, other in zip(ours.rollouts[:count], peers.rollouts, strict=False):
        assert_the_same_rollout(own, other, 1e-3 if own.number else 1e-4)
    steps = ours.rollouts[count].step if count < len(ours.rollouts) else len(ours.curve.lines)
    assert ours.curve.of("learning_rate") == peers.curve.of("learning_rate")
    assert ours.curve.of()[:steps] == pytest.approx(peers.curve.of()[:steps], abs=1e-4, rel=1e-4)
    norms, others = (ran.curve.of("grad_norm")[:steps] for ran in (ours, peers))
    assert norms[0] == pytest.approx(others[0], rel=1e-4)
    assert norms == pytest.approx(others, rel=1e-3)
    manifest = json.loads((peers.folder / "manifest.json").read_text())["settings"]
    with_kl = bool(manifest["reference"] and manifest["beta"]) and manifest["missing_eos"] != "drop"
    for own, other in zip(ours.told[:count], peers.told, strict=False):
        same = {name for name in own if name.startswith(("rollout/", "score/")) and "second" not in name}
        assert ("rollout/kl" in other) == with_kl
        for name in same - {"rollout/gamed"} - (set() if with_kl else {"rollout/kl"}):
            assert own[name] == pytest.approx(other[name], abs=2e-4), name


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def changed(ran: Ran, start: dict[str, Tensor]) -> Tensor:
    """What a run has made of the adapter that it started from."""
    own = adapter(ran.folder)
    return torch.cat([(own[name] - start[name]).flatten() for name in sorted(start)])


# --- one update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_the_first_update_is_the_same(world: Path, shown: list[Buffer], name: str) -> None:
    """Completions, advantages, loss, gradient and what the optimizer makes of it, from the same weights."""
    ours, peers = pair(world, shown, name, steps=1)
    assert_the_same_run(ours, peers)
    assert ours.rollouts[0].made.advantages.abs().max() > 1, "advantages of 0 show nothing"
    assert len({len(each) for each in ours.rollouts[0].completions}) > 3
    _, parent = curve(world / "recipe.yaml", "parent", world / "home", *SHORT)
    start = adapter(parent)
    mine, theirs = changed(ours, start), changed(peers, start)
    assert mine.norm() > 0.01
    assert (mine - theirs).norm() < 3e-4 * mine.norm()


# --- whole runs ------------------------------------------------------------------------------------------------------

VARIANTS = {
    "rloo": ("rloo",),
    "rloo, advantages of one scale, ends that cost": (
        "rloo", "normalise_advantages=true", "missing_eos=subtract", "missing_eos_score=-0.5", "epochs_per_rollout=1",
        "weights={reward: 2.0, film-reviews: 0.5}", "clip=0.1", "train.pack_tokens=200",
    ),
    "rloo, clipped scores and no reference": (
        "rloo", "score_clip=1.5", "missing_eos=keep", "reference=null", "generation.temperature=0.8",
    ),
    "rloo, another reference": ("rloo", "reference=base", "policy=sft", "stages.sft.train.max_steps=4", "beta=0.5"),
    "rloo, in full": ("rloo", *FULL),
    "grpo": ("grpo",),
    "grpo as DAPO, what is cut off left out": (
        "grpo", "aggregation=token_mean", "scale=none", "clip_high=0.28", "missing_eos=drop", "kl_ratio=true",
        "beta=2.0", "train.pack_tokens=300", "train.global_batch_size=2", "epochs_per_rollout=1",
    ),
    "grpo as Dr. GRPO, with entropy": (
        "grpo", "aggregation=constant", "scale=none", "entropy_weight=0.05", "beta=0.0", "generation.top_k=40",
        "generation.top_p=0.9", "prompts_per_rollout=4", "epochs_per_rollout=1",
    ),
    "grpo, checkpointing on a merged parent": (
        "grpo", "model={merge_parent: true}", "model.gradient_checkpointing=true",
    ),
    "rloo, checkpointing": ("rloo", "model.gradient_checkpointing=true", "train.pack_tokens=400", "train.seed=1"),
    "grpo, a scorer that reads a column": (
        "grpo", "reward=null", "scorers=[letters, vowels]", "prompts=questions", QUESTIONS, "completions=3",
        "prompts_per_rollout=4", "train.global_batch_size=2", "weights={letters: 3.0}", "generation.stop=[e]",
    ),
    "rloo, a function of one's own": (
        "rloo", "reward=null", "scorers=[vowels]", "functions=['own.py:hush']", "weights={hush: 2.0}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_engines_learn_the_same_from_the_same_completions(world: Path, shown: list[Buffer], variant: str) -> None:
    name, *settings = VARIANTS[variant]
    ours, peers = pair(world, shown, name, *settings)
    assert_the_same_run(ours, peers)
    assert len(ours.rollouts) > 1


def test_in_bf16_the_first_rollout_is_the_same(world: Path, shown: list[Buffer]) -> None:
    """Weights that differ by its rounding draw other tokens soon: at the second rollout the runs part."""
    ours, peers = pair(world, shown, "grpo", *FULL, "model.dtype=bfloat16", steps=4)
    assert_the_same_rollout(ours.rollouts[0], peers.rollouts[0], 1e-3)
    assert ours.curve.of() == pytest.approx(peers.curve.of(), abs=5e-3)
    assert ours.curve.of("grad_norm")[0] == pytest.approx(peers.curve.of("grad_norm")[0], rel=2e-2)


ENDS = slice(0, 4), slice(-4, None)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_scores_rise_alike(world: Path, shown: list[Buffer], name: str) -> None:
    settings = (
        *FULL, "reward=null", "scorers=[vowels]", "completions=8", "epochs_per_rollout=1", "prompts_per_rollout=4",
        "train.learning_rate=3e-3", "train.lr_scheduler=constant", "train.warmup_ratio=0", "missing_eos=keep",
        "generation.max_new_tokens=16",
    )  # fmt: skip
    ours, peers = pair(world, shown, name, *settings, steps=15)
    first, last = ([fmean(line["rollout/score"] for line in ran.told[part]) for ran in (ours, peers)] for part in ENDS)
    assert min(last) > 1.5 * max(first)
    assert last[0] == pytest.approx(last[1], abs=0.2)


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_the_artifact_is_one_of_aligns(world: Path, shown: list[Buffer]) -> None:
    ours, peers = pair(world, shown, "rloo")
    files = lambda folder: {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}  # noqa: E731
    assert (
        files(ours.folder) == files(peers.folder) >= {"samples.jsonl", "metrics.jsonl", "adapter/adapter_config.json"}
    )
    mine, theirs = adapter(ours.folder), adapter(peers.folder)
    assert {k: (t.dtype, t.shape) for k, t in mine.items()} == {k: (t.dtype, t.shape) for k, t in theirs.items()}
    for file in files(ours.folder):
        if file.startswith("adapter/") and not file.endswith(".safetensors"):
            assert (ours.folder / file).read_bytes() == (peers.folder / file).read_bytes(), file
    manifest, own = (json.loads((ran.folder / "manifest.json").read_text()) for ran in (peers, ours))
    assert (manifest["settings"]["engine"], manifest["steps"], manifest["packing"]) == ("trl", 5, asdict(TRL))
    for same in ("policy", "inputs", "data"):
        assert manifest[same] == own[same]
    lines = [(ran.folder / "samples.jsonl").read_text().splitlines() for ran in (ours, peers)]
    assert len(lines[0]) == 4
    for a, b in zip(*(map(json.loads, each) for each in lines), strict=True):
        assert {**a, "score": 0} == {**b, "score": 0}
        assert a["score"] == pytest.approx(b["score"], abs=1e-3)
    assert ours.told[0].keys() - peers.told[0].keys() == {"rollout/gamed"}
    assert peers.told[0].keys() <= ours.told[0].keys()
    missing = {"tokens_per_second", "policy/approx_kl", "policy/kl"}
    assert ours.curve.lines[-1].keys() - peers.curve.lines[-1].keys() == missing
    assert "null" not in (peers.folder / "metrics.jsonl").read_text()


def test_a_number_that_is_not_finite_stops_it_with_the_rows(world: Path, shown: list[Buffer]) -> None:
    stage = ("stages.grpo.engine=trl", "stages.grpo.reference=null", *FULL)
    with pytest.raises(TrainingError, match=r"of step \d+ is not finite under engine: trl. Rows of the data .*\[\d+"):
        Ran(world, shown, "grpo", *stage, "stages.grpo.train.learning_rate=1e30")
    with pytest.raises(TrainingError, match="scorer `broken` returned nan for the prompt in row"):
        Ran(world, shown, "grpo", *stage, "stages.grpo.scorers=[broken]", "stages.grpo.reward=null")


# --- what TRL is handed, and what it would do itself -----------------------------------------------------------------


def test_trls_own_generation_says_the_same_where_nothing_is_left_to_chance(
    world: Path, shown: list[Buffer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompts, padding, settings and ends: with one token to choose from, its own `generate` chooses it too."""
    seen: list[Any] = []
    own = online.on_rollouts

    def on_rollouts(parent: Any, watch: Any, rollouts: Any) -> Any:
        class Both(own(parent, watch, rollouts)):  # type: ignore[misc]
            def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any) -> Any:
                ours = super()._generate_single_turn(prompt_ids, *rest)
                trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
                seen.append((self, trained, ours, parent._generate_single_turn(self, prompt_ids, *rest)))
                return ours

        return Both

    monkeypatch.setattr(online, "on_rollouts", on_rollouts)
    for module in (online, request):  # a template whose turns end with another token than EOS
        monkeypatch.setattr(module, "end_ids", lambda t: {t.eos_token_id, t.convert_tokens_to_ids(".")})
    generation = "stages.rloo.generation={temperature: 0.7, top_k: 1, top_p: 0.9, max_new_tokens: 40}"
    Ran(world, shown, "rloo", "stages.rloo.engine=trl", generation, "stages.rloo.train.max_steps=1")
    ((trainer, trained, ours, theirs),) = seen
    assert ours == theirs
    assert len(set(map(tuple, ours))) > 2
    assert min(map(len, ours)) < max(map(len, ours)) == 40, "some end, and some are cut off"
    config = trainer.generation_config
    assert (config.temperature, config.top_k, config.top_p, config.max_new_tokens) == (0.7, 1, 0.9, 40)
    assert trained
    assert all(".default." in name for name in trained), "the reward model and the reference stay as they are"
    assert any(".reward." in name for name, _ in trainer.model.named_parameters())


def test_a_rollout_is_handed_over_before_every_pass_of_an_update() -> None:
    schedule = RolloutSchedule(prompts=5, size=2, batch=1, epochs=2, total_steps=6, seed=3)
    order = RolloutOrder(schedule, completions=3, passes=2)
    rows = list(order)
    assert len(rows) == len(order) == 6 * 2 * 2 * 3
    for step in range(6):
        for turn in range(2):
            (a, b), first = schedule.asked(step // 4), (step * 2 + turn) * 6
            assert rows[first : first + 6] == [a, a, a, b, b, b]


def settings_of(kind: type[RolloutStage], **settings: Any) -> RolloutStage:
    return kind(prompts="p", scorers=["vowels"], reference=None, **settings)


@pytest.mark.parametrize(
    ("missing", "expected", "weights"),
    [
        ("replace", [[5.0, None], [None, -1.0]], [2.0, 1.0]),
        ("subtract", [[5.0, 2.5], [None, -1.0]], [2.0, 1.0]),
        ("keep", [[5.0, 2.5]], [2.0]),
        ("drop", [[5.0, 2.5]], [2.0]),
    ],
)
def test_a_missing_end_is_told_in_trls_words(missing: str, expected: list[Any], weights: list[float]) -> None:
    """What gives None is left out of a completion's sum."""
    settings = settings_of(GRPO, missing_eos=missing, weights={"vowels": 2.0}, completions=2)
    prompt = PromptExample(4, "q", [{"role": "user", "content": "q"}], [1])
    scores = Scores(settings, [prompt], {"vowels": get_scorer("vowels")}, None)
    scores.ended = [True, False]
    told = [each(prompts=[0, 0], completions=["ee--", "e---"], completion_ids=[[1], [1]]) for each in scores.functions]
    assert told == expected
    assert scores.weights == weights
    assert [each.__name__ for each in scores.functions] == ["vowels", "missing_eos"][: len(expected)]
    assert scores.sums.tolist() == [10.0, 5.0]


def test_an_entropy_that_trl_means_over_passes_makes_a_step_one_pass() -> None:
    prompts = [PromptExample(i, "q", [], [1] * 10) for i in range(3)]
    train = {"global_batch_size": 2, "pack_tokens": 70}
    sizes = {"completions": 6, "train": train, "generation": {"max_new_tokens": 20}}
    assert online.micro_batch(settings_of(GRPO, **sizes), prompts) == 2
    assert online.micro_batch(settings_of(GRPO, entropy_weight=0.1, **sizes), prompts) == 12
    assert online.micro_batch(settings_of(RLOO, **sizes | {"completions": 7}), prompts) == 2


def test_a_model_that_trl_would_tell_no_positions_is_refused() -> None:
    sizes = GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(sizes)
    with pytest.raises(RecipeError, match="tells GPT2LMHeadModel no positions"):
        Seats(SimpleNamespace(model=model, base=model), autocast=False)  # type: ignore[arg-type]
