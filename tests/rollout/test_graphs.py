"""When a step is captured and what happens if it cannot be; capture itself needs a GPU."""

from __future__ import annotations

import logging

import pytest
import torch

from align.models import RoleModel
from align.rollout import decoder, sample
from align.rollout.graphs import StepGraphs
from tests.rollout.plain import settings


class Recorded:
    """As a graph: runs the step again at every replay, and never while it is recorded."""

    def __init__(self, step) -> None:
        self.step, self.replays = step, 0

    def replay(self) -> None:
        self.replays += 1
        self.out.copy_(self.step())


class EagerGraphs(StepGraphs):
    made: list[Recorded] = []  # noqa: RUF012

    def _capture(self, step):
        graph = Recorded(step)
        graph.out = torch.zeros(64, dtype=torch.bool)[: self.rows]
        EagerGraphs.made.append(graph)
        return graph, graph.out


def test_a_step_runs_then_is_captured_then_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    count = torch.zeros(1, dtype=torch.long)
    graphs = EagerGraphs()
    monkeypatch.setattr(EagerGraphs, "rows", 1, raising=False)
    EagerGraphs.made.clear()
    for n in range(1, 5):
        out = graphs("a", lambda: count.add_(1) % 2 == 0)
        assert int(count) == n
        assert bool(out) == (n % 2 == 0)
    assert [graph.replays for graph in EagerGraphs.made] == [3]
    graphs("b", lambda: count.add_(1) > 0)
    assert len(EagerGraphs.made) == 1, "other shapes run once before they are captured"


def test_what_cannot_be_captured_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    graphs, count = StepGraphs(), torch.zeros(1, dtype=torch.long)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            graphs("a", lambda: count.add_(1) > 0)  # there is no GPU here, or nothing that is on one
    assert int(count) == 4
    assert torch.cuda.is_available() or caplog.text.count("without CUDA graphs") == 1


@pytest.mark.parametrize("k", [1, 3])
def test_steps_of_fixed_shapes_draw_the_same(
    roles: RoleModel, tokenizer, prompts, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    """All that a graph asks of a step: tensors that stay where they are, and shapes that follow from the key."""
    wanted = settings(max_new_tokens=24, batch_size=9)
    expected = sample(roles, "policy", prompts, wanted, tokenizer, completions=k)
    own_init = decoder.Decoder.__init__

    def with_graphs(self, *args, **kwargs) -> None:
        own_init(self, *args, **{**kwargs, "graphs": True})

    seen: dict[object, set] = {}

    class Watched(StepGraphs):
        def __call__(self, key, step):
            (owner,) = [c.cell_contents for c in step.__closure__ if isinstance(c.cell_contents, decoder.Decoder)]
            tensors = [owner.token, owner.length, owner.before, owner.alive, owner.tokens, owner.logps, owner.draws]
            if owner.prompts is not None:
                tensors += [owner.prompts.lengths, owner.prompts.members, owner.prompts.place]
            seen.setdefault(id(self), set()).add(tuple((t.data_ptr(), tuple(t.shape)) for t in tensors))
            alive.append(self)
            return step()

    alive: list[StepGraphs] = []
    monkeypatch.setattr(decoder.Decoder, "__init__", with_graphs)
    monkeypatch.setattr(decoder, "StepGraphs", Watched)
    monkeypatch.setattr(decoder, "GRAPH_WIDTH", 5)
    found = sample(roles, "policy", prompts, wanted, tokenizer, completions=k)
    assert [[each.ids for each in own] for own in found] == [[each.ids for each in own] for own in expected]
    assert seen
    assert all(len(addresses) == 1 for addresses in seen.values())
