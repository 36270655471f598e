"""PPO and GRPO through the command line: killed while drawing, scoring and learning; reused, shared, loaded."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Cli
from tests.e2e.test_spine import copy_of, losses, ran

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

HERE = Path(__file__).parent
STAGES = ("base", "sft", "rm", "ppo", "grpo")
ROLLOUT = 16
"""Completions that PPO draws each time, before its steps 1, 3 and 5."""


def at(folder: Path) -> Cli:
    """A folder with the recipe and the function that it names."""
    for name in ("rlhf.yaml", "asked.py"):
        shutil.copy(HERE / name, folder / name)
    cli = Cli(folder)
    cli.recipe = folder / "rlhf.yaml"
    return cli


def run(cli: Cli, *arguments: str, code: int = 0) -> str:
    return cli.run("--allow-code", *arguments, recipe=cli.recipe, code=code)


def asked(cli: Cli) -> list[tuple[str, str]]:
    path = cli.folder / "asked.jsonl"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def metrics(cli: Cli, stage: str) -> list[dict]:
    lines = (cli.stage(stage, "rlhf") / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(timed)} for line in lines]


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory) -> Cli:
    """One undisturbed run."""
    folder = tmp_path_factory.mktemp("rlhf") / "run"
    copy_of(tiny_run, folder)
    cli = at(folder)
    cli.output = run(cli)
    return cli


def test_it_runs_whole(whole):
    assert [ran(whole.output, stage) for stage in STAGES] == ["reused", "reused", "done", "done", "done"]
    for stage in ("ppo", "grpo"):
        folder = whole.stage(stage, "rlhf")
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["policy"]["adapter"]
        assert {"rollout/reward", "score/gold", "policy/entropy", "policy/kl"} < manifest["metrics"].keys()
        shown = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert [line["rollout"] for line in shown] == [0, 0, 1, 1] + ([2, 2] if stage == "ppo" else [])
        work = whole.home / "work" / folder.resolve().name
        assert not (work / "rollouts").exists()
        assert not (work / "checkpoints").exists()
    assert [line["step"] for line in metrics(whole, "ppo") if "rollout/number" in line] == [0, 2, 4]
    assert len(asked(whole)) == 3 * ROLLOUT


def test_a_second_run_reuses_everything(whole):
    before = asked(whole)
    output = run(whole)
    assert [ran(output, stage) for stage in STAGES] == ["reused"] * 5
    assert asked(whole) == before


@pytest.fixture
def fresh(whole, tmp_path) -> Cli:
    """A copy in which PPO has not run yet."""
    folder = tmp_path / "copy"
    shutil.copytree(whole.home, folder / "home", symlinks=True)
    made = whole.stage("ppo", "rlhf").resolve().name
    shutil.rmtree(folder / "home" / "artifacts" / made)
    shutil.rmtree(folder / "home" / "work", ignore_errors=True)
    return at(folder)


def kill_when(cli: Cli, pattern: str, holds: str = "", *arguments: str) -> None:
    """Kill every process of a run as soon as a file of a stage's work folder is there and holds some text."""
    process = cli.start("run", str(cli.recipe), "--allow-code", "--until", "ppo", *arguments)
    deadline = time.monotonic() + 200
    try:
        while not any(not holds or holds in path.read_text() for path in (cli.home / "work").glob(f"*/{pattern}")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        cli._kill_all(process)


def kept(cli: Cli) -> list[str]:
    return sorted(path.name for path in (cli.home / "work").glob("*/rollouts/rollout-*"))


def while_drawing(cli: Cli) -> None:
    """The second rollout is drawn once the checkpoint before it is there; one row after the other, that takes long."""
    kill_when(cli, "checkpoints/step-000002", "", "--set", "stages.ppo.generation.batch_size=1")
    assert kept(cli) == ["rollout-000000"]
    assert len(asked(cli)) == ROLLOUT


def while_scoring(cli: Cli) -> None:
    (cli.folder / "die_at").write_text(str(ROLLOUT + 5))
    run(cli, "--until", "ppo", code=1)
    (cli.folder / "die_at").unlink()
    assert kept(cli) == ["rollout-000000"]
    assert len(asked(cli)) == ROLLOUT + 5


def while_learning(cli: Cli) -> None:
    kill_when(cli, "metrics.jsonl", '"step": 3, "loss"')
    assert "rollout-000001" in kept(cli)


@pytest.mark.parametrize(
    ("killed", "again"),
    [(while_drawing, 0), (while_scoring, 5), (while_learning, 0)],
    ids=["drawing", "scoring", "learning"],
)
def test_killed_it_ends_with_the_same_weights_and_asks_nothing_twice_that_was_kept(killed, again, whole, fresh):
    killed(fresh)
    output = run(fresh, "--until", "ppo")
    assert ran(output, "ppo") == "resumed"
    assert fresh.weights("ppo", "rlhf") == whole.weights("ppo", "rlhf")
    assert metrics(fresh, "ppo") == metrics(whole, "ppo")
    seen = asked(fresh)
    assert len(seen) == 3 * ROLLOUT + again
    assert set(seen) == set(asked(whole))


def test_two_processes_under_zero3_do_what_one_does(whole, fresh):
    """As long as the weights are the same: those that are trained differ by rounding, and draw another token once."""
    run(fresh, "--until", "ppo", "--set", "stages.ppo.launch={processes: 2, deepspeed: zero3}")
    ours, theirs = fresh.stage("ppo", "rlhf"), whole.stage("ppo", "rlhf")
    assert losses(ours)[:2] == pytest.approx(losses(theirs)[:2], abs=2e-4)
    assert sorted(asked(fresh)[:ROLLOUT]) == sorted(asked(whole)[:ROLLOUT])
    assert len(asked(fresh)) == 3 * ROLLOUT
    tensors = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (ours, theirs)]
    assert {name: t.shape for name, t in tensors[0].items()} == {name: t.shape for name, t in tensors[1].items()}
    assert not any("critic" in name or "score" in name for name in tensors[0])


def test_plain_peft_loads_it_and_says_what_align_says(whole):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer, BitsAndBytesConfig

    from align.artifacts.store import Store
    from align.models.platform import prepare_bitsandbytes
    from align.models.policies import load_policies
    from align.rollout.local import generate
    from align.spec.stages import GenerationSettings

    prepare_bitsandbytes()
    folder = whole.stage("ppo", "rlhf")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    plain = AutoPeftModelForCausalLM.from_pretrained(
        folder / "adapter", quantization_config=nf4, dtype=torch.float32
    ).eval()  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    fingerprint = json.loads((folder / "manifest.json").read_text())["fingerprint"]
    roles = load_policies(Store(whole.home), {"ppo": fingerprint})["ppo"]
    asked = [{"role": "user", "content": "Write a positive review."}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        assert torch.equal(roles("ppo", lambda lm: lm(input_ids=ids).logits), plain(input_ids=ids).logits)
        said = plain.generate(input_ids=ids, max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    greedy = GenerationSettings(max_new_tokens=20, temperature=0)
    assert generate(roles, "ppo", [prompt], greedy, tokenizer)[0] == said
