"""A reward model through the command line: on the spine's SFT policy, alone and on two ranks."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from tests.e2e.conftest import TINY, Cli
from tests.e2e.test_spine import copy_of, losses, ran

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

RM = """
kind: reward
policy: sft
data: preferences
train:
  max_steps: 12
  global_batch_size: 8
  learning_rate: 3e-3
  max_tokens: 256
  log_every_steps: 1
  validation: {fraction: 0.2, every_steps: 6}
"""


@pytest.fixture(scope="module")
def cli(tiny_run, tmp_path_factory) -> Cli:
    cli = copy_of(tiny_run, tmp_path_factory.mktemp("reward") / "run")
    recipe = yaml.safe_load(TINY.read_text())
    stages = {name: recipe["stages"][name] for name in ("base", "sft")} | {"rm": yaml.safe_load(RM)}
    data = {name: recipe["data"][name] for name in ("corpus", "demonstrations", "preferences")}
    cli.recipe = cli.folder / "rm.yaml"
    cli.recipe.write_text(yaml.safe_dump(recipe | {"name": "rm", "stages": stages, "data": data}))
    cli.output = cli.run(recipe=cli.recipe)
    return cli


def test_it_ends_with_its_numbers(cli):
    assert [ran(cli.output, stage) for stage in ("base", "sft", "rm")] == ["reused", "reused", "done"]
    assert "Pair accuracy" in cli.output
    assert "Right against sure" in (cli.folder / "runs" / "rm" / "report.html").read_text()
    told = json.loads(cli("results", str(cli.recipe), "--json"))["rewards"]["rm"]
    assert told["on"] == "held-out"
    assert told["pairs"] == 30
    manifest = json.loads((cli.stage("rm", "rm") / "manifest.json").read_text())
    assert manifest["metrics"]["evaluation/accuracy"] == told["accuracy"]["mean"]
    assert manifest["policy"] is None
    assert "rm" in cli("status", str(cli.recipe))
    assert "reuse" in cli("plan", str(cli.recipe))


def test_peft_loads_it(cli):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer, BitsAndBytesConfig

    from align.artifacts.store import Store
    from align.logps import last_rewards, pack_examples
    from align.models.platform import prepare_bitsandbytes
    from align.models.rewards import load_reward
    from tests.training.worlds import random_examples

    prepare_bitsandbytes()
    folder = cli.stage("rm", "rm") / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    plain = AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=tokenizer.pad_token_id, quantization_config=nf4, dtype=torch.float32
    ).eval()
    fingerprint = json.loads((cli.stage("rm", "rm") / "manifest.json").read_text())["fingerprint"]
    roles, scale = load_reward(Store(cli.home), fingerprint)
    for example in random_examples(3, 1):
        (pack,) = pack_examples([example], 100)
        with torch.no_grad():
            theirs = float(plain(input_ids=pack.input_ids).logits)
            assert float(roles("reward", last_rewards, pack)) * scale.std + scale.mean == pytest.approx(
                theirs, abs=1e-5
            )


@pytest.mark.parametrize("deepspeed", [pytest.param("zero2", marks=pytest.mark.long), "zero3"])
def test_two_processes_make_the_same_one(deepspeed, cli, tmp_path):
    two = Cli(tmp_path / "two")
    two.folder.mkdir()
    two.environment = {"ALIGN_HOME": str(cli.home)}
    launch = f"stages.rm.launch={{processes: 2, deepspeed: {deepspeed}}}"
    alone = cli.stage("rm", "rm").resolve()
    expected, before = losses(alone), json.loads((alone / "normalization.json").read_text())
    two.run("--set", launch, "--from", "rm", recipe=cli.recipe)
    found = two.stage("rm", "rm")
    assert losses(found) == pytest.approx(expected, abs=2e-4)
    after = json.loads((found / "normalization.json").read_text())
    assert (after["n"], after["on"]) == (before["n"], before["on"]) == (240, "data")
    assert (after["mean"], after["std"]) == pytest.approx((before["mean"], before["std"]), abs=1e-3)
