"""A score that rises while something else says that it is gamed is told, once, and nothing else is."""

from __future__ import annotations

import json

import pytest

from align.training import online as making
from align.training.gaming import ADVICE, ENOUGH, told_gaming
from tests.training.worlds import Run, save_tiny_base

HEALTHY = {"score/reward": (0.0, 2.0), "score/gold": (0.0, 1.0), "rollout/length": (40.0, 50.0)}
HEALTHY |= {"rollout/kl": (0.0, 9.0), "rollout/ended": (0.9, 0.8)}


def history(rollouts: int = 12, **ends: tuple[float, ...]) -> list[dict[str, float]]:
    """Numbers that go in a straight line from one value to the next."""
    found: list[dict[str, float]] = []
    for i in range(rollouts):
        at = i / max(rollouts - 1, 1)
        line = {}
        for name, values in (HEALTHY | {key.replace("_", "/", 1): value for key, value in ends.items()}).items():
            parts = len(values) - 1
            k = min(int(at * parts), parts - 1)
            line[name] = values[k] + (values[k + 1] - values[k]) * (at * parts - k)
        found.append(line)
    return found


def told(lines: list[dict[str, float]]) -> list[str]:
    return told_gaming(lines, ["reward"], ["reward", "gold"])


def test_a_healthy_run_is_not_suspicious():
    assert told(history()) == []


def test_nothing_is_told_of_a_few_rollouts():
    gamed = {"score_gold": (1.0, 0.0), "rollout_kl": (0.0, 99.0)}
    assert told(history(ENOUGH - 1, **gamed)) == []
    assert len(told(history(ENOUGH, **gamed))) == 2


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({"score_gold": (1.0, 0.5)}, "while `gold`, which only watches, fell from 0.932 to 0.568"),
        ({"score_gold": (0.0, 1.0, 0.2)}, "while `gold`, which only watches, fell from"),
        ({"rollout_length": (40.0, 90.0)}, "while completions went from 47 to 83 tokens"),
        ({"rollout_length": (90.0, 30.0)}, "while completions went from 82 to 38 tokens"),
        ({"rollout_kl": (0.0, 40.0)}, "at a KL of 35 nats per completion to the reference"),
        ({"rollout_ended": (0.9, 0.1)}, "while the share of completions that end fell from 79% to 21%"),
    ],
)
def test_what_is_suspicious_is_told_in_words(ends, expected):
    (message,) = told(history(**ends))
    assert message.startswith("the score `reward` rose from 0.273 to 1.73 " + expected)
    assert message.endswith(ADVICE)


def test_nothing_is_gamed_where_the_score_does_not_rise():
    bad = {"score_gold": (1.0, 0.0), "rollout_kl": (0.0, 99.0), "rollout_length": (10.0, 90.0)}
    assert told(history(**bad, score_reward=(2.0, 1.0))) == []
    assert len(told(history(**bad))) == 3


def test_a_score_that_is_rewarded_does_not_watch():
    lines = history(score_gold=(1.0, 0.0))
    assert told_gaming(lines, ["reward", "gold"], ["reward", "gold"]) == []


def test_without_a_reference_there_is_no_kl():
    lines = [{name: value for name, value in line.items() if name != "rollout/kl"} for line in history()]
    assert told(lines) == []


def test_it_is_told_once_and_logged_with_every_rollout(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "told_gaming", lambda history, *_: ["it is gamed"] if len(history) > 1 else [])
    trainer = Run(save_tiny_base(tmp_path / "base"), tmp_path / "run", "grpo", steps=9).trainer()
    warned = []
    monkeypatch.setattr(trainer.online.report, "warn", warned.append)
    trainer.fit()
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["rollout/gamed"] for line in lines if "rollout/gamed" in line] == [0.0, 1.0, 1.0]
    assert warned == ["rollout 2: it is gamed"]
    columns = {"rollout/kl", "rollout/length", "rollout/ended", "rollout/reward", "score/reward", "score/x"}
    assert [set(each) for each in trainer.online.buffer.progress.history] == [columns] * 3
