"""What registration refuses, what is no loss, and methods of other packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import BaseModel

import align.methods
from align.errors import LaunchError, TrainingError
from align.methods import GROUP, load_plugin, method
from align.runner.doctor import method_plugins
from align.spec.stages import PairedStage, RankedStage, Referenced, TokensStage, TrainedStage, UnpairedStage
from align.stages.probe import methods_here
from align.types import Batch, LossOutput, Needs, Term, checked


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A copy, so that what a test registers goes with it."""
    align.methods.all_methods()
    monkeypatch.setattr(align.methods, "_REGISTRY", dict(align.methods._REGISTRY))
    return align.methods._REGISTRY


class Paired(PairedStage):
    kind: Literal["mine"] = "mine"


class Unpaired(UnpairedStage):
    kind: Literal["mine"] = "mine"


class Ranked(RankedStage):
    kind: Literal["mine"] = "mine"


class Tokens(TokensStage):
    kind: Literal["mine"] = "mine"


class OwnData(TrainedStage):
    kind: Literal["mine"] = "mine"
    data: str


class NoData(TrainedStage):
    kind: Literal["mine"] = "mine"


class Against(PairedStage, Referenced):
    kind: Literal["mine"] = "mine"


class Listed(RankedStage, Referenced):
    kind: Literal["mine"] = "mine"


class Prompted(PairedStage):
    kind: Literal["mine"] = "mine"
    loss_on: Literal["completion", "all"] = "completion"


class Whole(TokensStage):
    kind: Literal["mine"] = "mine"
    loss_on: Literal["completion", "all"] = "completion"


class NoKind(PairedStage):
    beta: float = 1.0


class Text(PairedStage):
    kind: str = "mine"


class Two(PairedStage):
    kind: Literal["mine", "other"] = "mine"


class NoDefault(PairedStage):
    kind: Literal["mine"]


class Compare(PairedStage):
    kind: Literal["compare"] = "compare"


class NoStage(BaseModel):
    kind: Literal["mine"] = "mine"


def loss(logps: Any, config: Any) -> LossOutput:
    raise NotImplementedError


def other_loss(logps: Any, config: Any) -> LossOutput:
    raise NotImplementedError


def statistic(logps: Any, config: Any) -> dict[str, Term]:
    raise NotImplementedError


def register(
    config: Any,
    batch: Batch,
    *needs: Needs,
    reference: bool = False,
    loss: Callable[..., Any] = loss,
    statistic: Callable[..., Any] | None = None,
) -> Any:
    asked = {"needs": set(needs or [Needs.LOGPS]), "reference": reference, "statistic": statistic}
    return method(config, batch=batch, source="x", **asked)(loss)


@pytest.mark.parametrize(
    ("config", "batch", "needs", "reference"),
    [
        (Paired, Batch.PAIRED, (), False),
        (Unpaired, Batch.UNPAIRED, (), False),
        (Ranked, Batch.RANKED, (), False),
        (Ranked, Batch.RANKED, (Needs.REWARDS,), False),
        (Tokens, Batch.TOKENS, (), False),
        (OwnData, Batch.TOKENS, (), False),
        (Against, Batch.PAIRED, (), True),
        (Prompted, Batch.PAIRED, (Needs.LOGPS, Needs.PROMPT_LOGPS), False),
    ],
)
def test_what_fits_is_registered(
    registry: dict[str, Any], config: Any, batch: Batch, needs: tuple[Needs, ...], reference: bool
) -> None:
    assert register(config, batch, *needs, reference=reference) is loss
    assert registry["mine"].config is config


@pytest.mark.parametrize(
    ("config", "batch", "needs", "reference", "told"),
    [
        *((each, Batch.PAIRED, (), False, "needs `kind: Literal") for each in (NoKind, Text, Two, NoDefault)),
        (Compare, Batch.PAIRED, (), False, "the kind `compare` is taken"),
        (
            Paired,
            Batch.UNPAIRED,
            (),
            False,
            "batch=Batch.UNPAIRED goes with UnpairedStage, and Paired does not stand on it",
        ),
        (Unpaired, Batch.RANKED, (), False, "goes with RankedStage"),
        (Tokens, Batch.PAIRED, (), False, "goes with PairedStage"),
        (Paired, Batch.TOKENS, (), False, "goes with TokensStage"),
        (NoData, Batch.TOKENS, (), False, "goes with TokensStage"),
        (NoStage, Batch.TOKENS, (), False, "goes with TokensStage"),
        (Paired, Batch.PAIRED, (), True, "reference=True, but Paired has no field `reference`"),
        (Against, Batch.PAIRED, (), False, "reference=False, but Against has a field `reference`"),
        (Listed, Batch.RANKED, (), True, "reference=True, but a batch of RANKED hands no reference over"),
        (Paired, Batch.PAIRED, (Needs.LOGPS, Needs.PROMPT_LOGPS), False, "Paired has no field `loss_on`"),
        (Paired, Batch.PAIRED, (Needs.REWARDS,), False, "Needs.REWARDS comes with batch=Batch.RANKED only"),
        (
            Whole,
            Batch.TOKENS,
            (Needs.LOGPS, Needs.PROMPT_LOGPS),
            False,
            "PROMPT_LOGPS comes with batch=Batch.PAIRED only, not with TOKENS",
        ),
        (Prompted, Batch.PAIRED, (Needs.PROMPT_LOGPS,), False, "`needs` has neither LOGPS nor REWARDS"),
    ],
)
def test_what_does_not_fit_is_refused(
    registry: dict[str, Any], config: Any, batch: Batch, needs: tuple[Needs, ...], reference: bool, told: str
) -> None:
    with pytest.raises(LaunchError, match=r"(?s)registry\.loss: .*fix: ") as caught:
        register(config, batch, *needs, reference=reference)
    assert told in str(caught.value)
    assert "mine" not in registry


@pytest.mark.parametrize("config", [Paired, Ranked, Tokens])
def test_a_statistic_needs_rows_that_carry_another_prompts_completion(registry: dict[str, Any], config: Any) -> None:
    batch = Batch[config.__name__.upper()]
    with pytest.raises(LaunchError, match=f"`statistic` comes with batch=Batch.UNPAIRED only, not with {batch.name}"):
        register(config, batch, statistic=statistic)
    assert "mine" not in registry
    register(Unpaired, Batch.UNPAIRED, statistic=statistic)
    assert registry["mine"].statistic is statistic


def test_two_losses_of_one_kind_are_refused_and_the_same_one_again_is_not() -> None:
    register(Paired, Batch.PAIRED)
    register(Paired, Batch.PAIRED)
    with pytest.raises(
        LaunchError, match=r"two losses have the kind `mine`: .*registry.loss and .*registry.other_loss"
    ):
        register(Paired, Batch.PAIRED, loss=other_loss)


# --- what a loss returns ---------------------------------------------------------------------------------------------


def test_a_mean_is_no_term() -> None:
    with pytest.raises(ValueError, match=r"Term\.sum has no axis: return one value per unit"):
        Term(torch.ones(3).mean(), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"Term\.sum has 2 axes"):
        Term(torch.ones(3, 2), torch.ones(3, 2))


@pytest.mark.parametrize("value", [torch.ones(()), torch.ones(1), torch.ones(3, 1)])
def test_a_loss_has_the_shape_of_its_weight(value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"its weight \(3,\): return one value per example"):
        LossOutput.of_examples(value, weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"Term\.sum has no axis"):
        LossOutput.of_examples(torch.ones(3).mean())


def test_what_the_step_applies_is_checked() -> None:
    output = LossOutput.of_examples(torch.ones(3))
    assert checked(output, "mine") is output
    with pytest.raises(TrainingError, match="the loss of `mine` returned a Tensor, not a LossOutput"):
        checked(torch.ones(3), "mine")
    with pytest.raises(TrainingError, match="the loss of `mine` returned no terms"):
        checked(LossOutput({}), "mine")


# --- other packages --------------------------------------------------------------------------------------------------

MINE = """\
'''Mine: the negative log-ratio.'''
from typing import Literal
from align.methods import method
from align.spec.stages import PairedStage
from align.types import Batch, LossOutput, Needs

class Mine(PairedStage):
    kind: Literal["mine"] = "mine"

@method(Mine, batch=Batch.PAIRED, needs={Needs.LOGPS}, reference=False, source="none")
def mine_loss(logps, config):
    return LossOutput.of_examples(logps.rejected.mean - logps.chosen.mean, weight=logps.weight)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], EntryPoint]:
    """Install a package with one plug-in of this source; its entry point."""

    def install(source: str) -> EntryPoint:
        name = f"plugged_{tmp_path.name}".replace("-", "_")
        info = tmp_path / "my_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\nmine = {name}\n")
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return entry_points(group=GROUP)["mine"]

    return install


def test_a_plug_in_registers_its_method(registry: dict[str, Any], installed: Callable[[str], EntryPoint]) -> None:
    entry = installed(MINE)
    assert load_plugin(entry) == ["mine"]
    assert load_plugin(entry) == ["mine"]  # imported before
    assert registry["mine"].summary == "Mine: the negative log-ratio."
    (finding,) = method_plugins(methods_here())
    assert (finding.what, finding.state, finding.found) == ("method plug-in mine", "ok", "mine")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import surely_not_installed", r"\) of my-package cannot be imported: ModuleNotFoundError: No module named"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("def", "cannot be imported: SyntaxError"),
        (MINE.replace("@method", "# "), "of my-package registers no method; is `@method` missing?"),
        (MINE.replace('"mine"', '"dpo"'), "two losses have the kind `dpo`: align.methods.dpo.dpo_loss and plugged_"),
    ],
)
def test_a_plug_in_that_gives_no_method_is_told(installed: Callable[[str], EntryPoint], source: str, told: str) -> None:
    entry = installed(source)
    with pytest.raises(LaunchError, match=told):
        load_plugin(entry)
    (finding,) = method_plugins(methods_here())
    assert finding.state == "broken"
    assert finding.meaning


def test_a_broken_plug_in_is_told_without_a_traceback(installed: Callable[[str], EntryPoint], tmp_path: Path) -> None:
    installed("import surely_not_installed")
    argv, env = [sys.executable, "-m", "align", "methods"], os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == LaunchError.exit_code
    assert "Traceback" not in ended.stderr
    assert "align.methods `mine` (plugged_" in ended.stderr.replace("\n", " ")
