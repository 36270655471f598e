"""One recipe runs pretrain, SFT, DPO and the comparison; what it leaves behind is reused, resumed and loadable."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
import torch

from align.recipe import build_graph, load_recipe
from align.recipe.plan import make_plan
from tests.e2e.conftest import TINY, Cli

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def copy_of(run: Cli, folder) -> Cli:
    """The same home and runs at another place, for tests that change them."""
    shutil.copytree(run.folder, folder, symlinks=True, dirs_exist_ok=True)
    for link in (folder / "runs" / "tiny").iterdir():
        if link.is_symlink():
            link.unlink()
    return Cli(folder)


def ran(output: str, stage: str) -> str:
    """What the run says of a stage: reused, done or resumed."""
    lines = [line.split() for line in output.splitlines() if line.strip().startswith(stage + " ")]
    return next(word for line in lines for word in line if word in ("reused", "done", "resumed"))


def test_the_last_lines_are_the_table_and_the_report(tiny_run):
    lines = [line for line in tiny_run.output.splitlines() if line.strip()]
    assert "report.html" in lines[-1]
    assert any("dpo" in line and "sft" not in line for line in lines[-12:])
    page = (tiny_run.folder / "runs" / "tiny" / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_results_as_json(tiny_run):
    results = json.loads(tiny_run("results", str(TINY), "--json"))
    gold = results["candidates"]["dpo"]["gold"]
    assert set(results["candidates"]) == {"base", "sft", "dpo"}
    assert gold["n"] == 12
    assert gold["low"] <= gold["mean"] <= gold["high"]


def test_what_the_plan_says_of_packing_is_what_was_done(tiny_run, tmp_path):
    graph = build_graph(load_recipe(TINY), tmp_path)
    planned = {row.stage: row.packing for row in make_plan(graph, lambda fingerprint: False).rows if row.trains}
    assert {name: choice.packing for name, choice in planned.items()} == {
        "base": "flat",
        "sft": "flat",
        "dpo": "shared",
    }
    for name, choice in planned.items():
        assert tiny_run.manifest(name)["packing"] == asdict(choice)
        assert f"packing {choice}" in (tiny_run.folder / "runs" / "tiny" / "logs" / f"{name}.txt").read_text()


def test_a_second_run_reuses_everything(tiny_run):
    output = tiny_run.run()
    assert [ran(output, s) for s in ("base", "sft", "dpo", "comparison")] == ["reused"] * 4


def test_only_what_a_change_touches_runs_again(tiny_run, tmp_path):
    cli = copy_of(tiny_run, tmp_path / "copy")
    output = cli.run("--set", "launch.processes=2", "--set", "stages.dpo.train.log_every_steps=7")
    assert [ran(output, s) for s in ("base", "sft", "dpo", "comparison")] == ["reused"] * 4
    output = cli.run("--set", "stages.dpo.beta=0.3")
    assert [ran(output, s) for s in ("base", "sft", "dpo", "comparison")] == ["reused", "reused", "done", "done"]
    metrics = cli.manifest("dpo")["metrics"]
    assert (metrics["reference/computed"], metrics["reference/reused"]) == (0, 300), "in a copy of the store, too"


@pytest.mark.parametrize("stage", ["base", "sft", "dpo"])
def test_killed_after_the_second_checkpoint_ends_with_the_same_weights(stage, tiny_run, tmp_path):
    cli = Cli(tmp_path / "killed")
    before = {"base": None, "sft": "base", "dpo": "sft"}[stage]
    if before:
        cli = copy_of(tiny_run, tmp_path / "killed")
        fingerprint = tiny_run.manifest(stage)["fingerprint"]
        removed = [p for p in (cli.home / "artifacts").iterdir() if fingerprint.startswith(p.name.split("-")[-1])]
        assert len(removed) == 1
        shutil.rmtree(removed[0])
        shutil.rmtree(cli.home / "work", ignore_errors=True)
    cli.kill_after_checkpoint(10, "--until", stage)
    output = cli.run("--until", stage)
    assert ran(output, stage) == "resumed"
    log = (cli.folder / "runs" / "tiny" / "logs" / f"{stage}.txt").read_text()
    resumed = int(log.split("resuming from step ")[1].split()[0])
    assert resumed >= 10
    assert cli.weights(stage) == tiny_run.weights(stage)


def test_the_adapter_loads_in_plain_peft_and_says_what_align_says(tiny_run):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer, BitsAndBytesConfig

    import align.models
    from align.artifacts.store import Store
    from align.models.policies import load_policies
    from align.rollout.local import generate
    from align.spec.stages import GenerationSettings

    align.models.platform.prepare_bitsandbytes()
    adapter = tiny_run.stage("dpo") / "adapter"
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    plain = AutoPeftModelForCausalLM.from_pretrained(adapter, quantization_config=nf4, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    roles = load_policies(Store(tiny_run.home), {"dpo": tiny_run.manifest("dpo")["fingerprint"]})["dpo"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write a positive review."}], add_generation_prompt=True, return_dict=False
    )
    ids = torch.tensor([prompt])
    with torch.no_grad():
        own = roles("dpo", lambda lm: lm(input_ids=ids).logits)
        assert torch.equal(own, plain(input_ids=ids).logits)
        said = plain.generate(input_ids=ids, max_new_tokens=20, do_sample=False)[0, len(prompt) :].tolist()
    greedy = GenerationSettings(max_new_tokens=20, temperature=0)
    assert generate(roles, "dpo", [prompt], greedy, tokenizer)[0] == said


@pytest.mark.parametrize(
    ("sft", "dpo"),
    [("zero2", "zero3"), *(pytest.param(each, each, marks=pytest.mark.long) for each in ("none", "zero2", "zero3"))],
)
def test_two_processes_through_the_command_line(sft, dpo, tiny_run, tmp_path):
    """SFT then DPO on two ranks give the losses of one process; the saved adapter is whole."""
    cli = copy_of(tiny_run, tmp_path / "two")
    launched = {"sft": sft, "dpo": dpo}
    sets = [f"stages.{stage}.launch={{processes: 2, deepspeed: {each}}}" for stage, each in launched.items()]
    sets.append("name=two")
    cli.run(*(word for s in sets for word in ("--set", s)), "--from", "sft", "--until", "dpo")
    for stage in ("sft", "dpo"):
        alone, two = losses(tiny_run.stage(stage)), losses(cli.stage(stage, "two"))
        assert two == pytest.approx(alone, abs=2e-4)


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
