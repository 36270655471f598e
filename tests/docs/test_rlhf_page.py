"""The page on RLHF: its recipe is one, its settings and metrics exist, its figures are those of the arithmetic."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from align.methods import get_method
from align.recipe import build_graph, load_recipe
from align.recipe.memory import training_memory
from align.recipe.sizes import size_of_architecture
from align.spec.model import Architecture, LoraSettings, ModelSettings
from align.spec.train import LaunchSettings

GIB = 2**30
STATES = ("base", "trained weights", "frozen adapters", "gradients", "optimizer")
METHODS = ("ppo", "rloo", "grpo", "reinforce_pp")


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "howto" / "rlhf.md").read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the first table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    first = text.splitlines().index(lines[0])
    table = [line for line in text.splitlines()[first:] if line.startswith("|") or not line]
    own = table[: table.index("")] if "" in table else table
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in own[2:]]


def test_its_recipe_is_one(page: str, tmp_path: Path) -> None:
    recipe = re.search(r"```yaml\n(name: .*?)```", page, re.S)
    assert recipe is not None
    assert len(recipe[1].splitlines()) <= 25
    for name in ("demonstrations", "comparisons", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    (tmp_path / "recipe.yaml").write_text(recipe[1])
    graph = build_graph(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "home")
    assert list(graph.nodes) == ["sft", "rm", "ppo", "best"]


def test_its_settings_exist(page: str) -> None:
    configs = [get_method(kind).config for kind in METHODS]
    known = {name for config in configs for name in config.model_fields} | {"top_p"}
    known |= {f"{part}.{name}" for part in ("train", "generation") for name in nested(configs[0], part)}
    asked = {name for row in rows(section(page, "What to set")) for name in re.findall(r"`([^`]+)`", row[0])}
    assert len(asked) > 15
    assert asked <= known


def nested(config: type, part: str) -> dict[str, object]:
    return config.model_fields[part].annotation.model_fields


def test_its_defaults_are_those_of_the_settings(page: str) -> None:
    given = {row[0]: row[1] for row in rows(section(page, "What to set"))}
    fields = {kind: get_method(kind).config.model_fields for kind in METHODS}
    assert given["`completions`"] == "1 for ppo and reinforce_pp, 4 rloo, 8 grpo"
    assert [fields[kind]["completions"].default for kind in METHODS] == [1, 4, 8, 1]
    assert float(given["`beta`"]) == fields["ppo"]["beta"].default
    assert (
        given["`missing_eos`"]
        == f"`{fields['ppo']['missing_eos'].default}`, {fields['ppo']['missing_eos_score'].default:.0f}"
    )
    assert given["`normalise_scores`"] == str(fields["ppo"]["normalise_scores"].default).lower()
    assert given["`whiten_advantages`"] == str(fields["ppo"]["whiten_advantages"].default).lower()
    for name in ("kl_target", "critic_learning_rate", "stop_kl", "ptx"):
        assert fields["ppo"][name].default is None
        assert next(begin for setting, begin in given.items() if f"`{name}`" in setting) == "absent"


def test_its_metrics_are_logged(page: str, repository: Path) -> None:
    source = "".join(path.read_text() for path in (repository / "align").rglob("*.py"))
    told = {name for row in rows(section(page, "What to look at")) for name in re.findall(r"`([^`]+)`", row[0])}
    assert len(told) > 10
    for name in told - {"score/reward", "score/<name>"}:
        assert f'"{name}"' in source, name


def test_the_figures_at_7b_are_the_arithmetic(page: str) -> None:
    architecture = Architecture(hidden_size=4096, intermediate_size=11008, layers=32, heads=32, tie_embeddings=False)
    size = size_of_architecture(architecture, 32_000)

    def states(adapter: LoraSettings | str, deepspeed: str, **options: object) -> float:
        model = ModelSettings(base="b", quantization="none" if adapter == "none" else "nf4", adapter=adapter)
        launch = LaunchSettings(deepspeed=deepspeed)
        found = training_memory(size, model, launch, pack_tokens=1, compute_bytes=2, **options)
        return sum(found.get(name, 0) for name in STATES) / GIB

    seats = {"critic": True, "frozen_adapters": 2}
    r16, r64 = LoraSettings(rank=16), LoraSettings(rank=64)
    bf16, nf4 = (4 * size.frozen_bytes(each, 2) / GIB for each in ("none", "nf4"))
    shared = states(r16, "zero1", **seats)  # mixed precision: frozen adapters in bf16
    adapters = shared - nf4 / 4
    figures = [figure for _, figure in rows(section(page, "Memory"))]
    assert figures == [
        f"{2 * states('none', 'zero1') + bf16 / 2:.2f}",
        f"{bf16 + adapters:.2f}",
        f"{nf4:.2f} + {adapters:.2f}",
        f"{shared:.2f}",
        f"{states(r64, 'zero1', **seats):.2f}",
        f"{states(r16, 'none', **seats):.2f}",
    ]
    assert figures[:4] == ["225.92", "51.55", "14.40 + 1.34", "4.94"]


def test_the_measured_table_adds_up(page: str) -> None:
    text = section(page, "Memory").partition("to the bit:")[2]
    *parts, whole = [[float(cell.strip(" |")) for cell in row[1:]] for row in rows(text)[:-1]]
    assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(whole, abs=0.2)
    sft, ppo, _, _, four = whole
    assert f"takes {ppo / sft:.2f} of an SFT step" in text
    assert f"four bases {four / ppo:.1f} times of one" in text
