from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MambaConfig

from align.models import RoleModel, load_base
from align.rollout.beam import _batch, beam
from align.rollout.request import Request
from tests.models.tiny import LORA, randomise
from tests.rollout.plain import greedy, logps, settings
from tests.rollout.test_proof import SPECIAL, roles_of


@pytest.fixture
def stopping(tokenizer, roles: RoleModel, prompts):
    """A tokenizer whose EOS is a token that beams reach early and late."""
    own, tokenizer.eos_token_id = tokenizer.eos_token_id, greedy(roles, "policy", prompts[0], 24, ())[7]
    yield tokenizer
    tokenizer.eos_token_id = own


def transformers_beams(roles: RoleModel, role: str, prompt: list[int], beams: int, ends: list[int]) -> list[list[int]]:
    config = GenerationConfig(
        max_new_tokens=24, do_sample=False, num_beams=beams, num_return_sequences=beams, eos_token_id=ends,
        pad_token_id=1, length_penalty=1.0, early_stopping=False, use_cache=True,
    )  # fmt: skip
    with torch.no_grad():
        out = roles(role, lambda m: m.generate(torch.tensor([prompt]), generation_config=config))
    rows = out[:, len(prompt) :].tolist()
    return [row[: next((t + 1 for t, token in enumerate(row) if token in ends), len(row))] for row in rows]


@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("role", ["policy", "base"])
def test_beam_search_is_that_of_transformers(roles: RoleModel, stopping, prompts, role: str, beams: int) -> None:
    ends = sorted(Request(prompts, settings(), stopping).ends(roles.causal_lm))
    found = beam(roles, role, prompts, settings(batch_size=20), stopping, beams=beams)
    ended = 0
    for prompt, own in zip(prompts, found, strict=True):
        expected = transformers_beams(roles, role, prompt, beams, ends)
        assert [each.ids for each in own] == expected
        assert [each.ended for each in own] == [each.ids[-1] in ends for each in own]
        ended += sum(each.ended for each in own)
    assert role == "base" or 0 < ended < beams * len(prompts)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_one_beam_without_penalty_are_greedy(roles: RoleModel, stopping, prompts, groups: int) -> None:
    ends = Request(prompts, settings(), stopping).ends(roles.causal_lm)
    found = beam(roles, "policy", prompts, settings(), stopping, beams=groups, groups=groups)
    for prompt, own in zip(prompts, found, strict=True):
        assert [each.ids for each in own] == [greedy(roles, "policy", prompt, 24, ends)] * groups


def test_a_penalty_keeps_groups_apart(roles: RoleModel, stopping, prompts) -> None:
    cold = settings(temperature=0.8)
    found = beam(roles, "policy", prompts[:8], cold, stopping, beams=4, groups=4, penalty=1.0)
    ends = Request(prompts, cold, stopping).ends(roles.causal_lm)
    for prompt, own in zip(prompts, found, strict=False):
        assert own[0].ids == greedy(roles, "policy", prompt, 24, ends), "the first group pays nothing"
        for each in own:
            assert each.logps == pytest.approx(logps(roles, "policy", prompt, each.ids, 0.8), abs=1e-5)
    assert sum(len({tuple(each.ids) for each in own}) for own in found) > 24


def test_two_groups_of_two_beams_go_on_from_their_own(roles: RoleModel, stopping, prompts) -> None:
    found = beam(roles, "policy", prompts[:5], settings(), stopping, beams=4, groups=2, penalty=0.5)
    alone = beam(roles, "policy", prompts[:5], settings(), stopping, beams=2)
    for own, first in zip(found, alone, strict=True):
        assert [each.ids for each in own[:2]] == [each.ids for each in first]
        assert {tuple(each.ids) for each in own[2:]} != {tuple(each.ids) for each in own[:2]}


class Table:
    """A model whose next token depends on the last one only: log-probabilities by hand."""

    def __init__(self, rows: dict[int, list[float]]) -> None:
        self.rows = {token: torch.tensor(row).log() for token, row in rows.items()}

    def first(self, prompts: list[list[int]], beams: int) -> torch.Tensor:
        return torch.stack([self.rows[prompt[-1]] for prompt in prompts for _ in range(beams)])

    def next(self, tokens: list[int], origin: list[int]) -> torch.Tensor:
        return torch.stack([self.rows[token] for token in tokens])


def by_hand(tokenizer, table: dict[int, list[float]], beams: int, penalty: float, **changes: Any) -> list[Any]:
    request = Request([[0]], settings(max_new_tokens=2, **changes), tokenizer, beams)
    (found,) = _batch(Table(table), request, [0], {3}, beams, penalty)  # type: ignore[arg-type]
    return found


def test_the_penalty_by_hand(tokenizer) -> None:
    """log 0.5 - log 0.3 = 0.51, log 0.5 - log 0.15 = 1.20, log 0.7 - log 0.2 = 1.25, log 0.3 - log 0.15 = 0.69."""
    table = {
        0: [0.05, 0.5, 0.3, 0.15],
        1: [0.05, 0.2, 0.7, 0.05],
        2: [0.6, 0.05, 0.3, 0.05],
    }
    ids = lambda *given, **changes: [each.ids for each in by_hand(tokenizer, table, *given, **changes)]  # noqa: E731
    # Second step: group 1 says 2 after 1; group 2, after 2, says 0, which nobody has said.
    assert ids(2, 0.5) == [[1, 2], [1, 2]]  # 0.5 < 0.51: as if there were none
    assert ids(2, 0.6) == [[1, 2], [2, 0]]
    # Three groups at 0.6: the third sees 1 and 2 taken once each and takes 1 again; then 2 costs 0.6 and still wins.
    assert ids(3, 0.6) == [[1, 2], [2, 0], [1, 2]]
    # At 1.3 the third group takes token 3, the end; 1 and 2 cost 1.3 each.
    found = by_hand(tokenizer, table, 3, 1.3)
    assert [each.ids for each in found] == [[1, 2], [2, 0], [3]]
    assert [each.ended for each in found] == [False, False, True]
    # Four: 1 costs 1.3 (-1.99), 2 as much (-2.50), 3 too (-3.20), 0 nothing (-3.00): 1 again. Then 2 costs 1.3
    # (-1.66), 1 nothing (-1.61).
    assert ids(4, 1.3)[3] == [1, 1]
    assert by_hand(tokenizer, table, 4, 1.3)[3].logps == pytest.approx([math.log(0.5), math.log(0.2)])
    # At a temperature of 2 all differences are halved, so less of a penalty tells groups apart.
    assert ids(2, 0.3, temperature=2.0) == [[1, 2], [2, 0]]
    assert ids(2, 0.3) == [[1, 2], [1, 2]]


def test_a_stop_string_ends_a_beam(roles: RoleModel, tokenizer, prompts) -> None:
    (free,) = beam(roles, "policy", prompts[:1], settings(), tokenizer, beams=1)
    string = tokenizer.decode(free[0].ids[3:5])[-2:]
    (found,) = beam(roles, "policy", prompts[:1], settings(stop=[string]), tokenizer, beams=1)
    n = next(n for n in range(25) if string in tokenizer.decode(free[0].ids[:n]))
    assert found[0].ids == free[0].ids[:n]
    assert found[0].ended


def test_beams_of_an_adapter_on_nf4(folders, tokenizer, prompts) -> None:
    roles = RoleModel(load_base(folders["qwen2"], quantization="nf4"))
    roles.add_adapter("policy", settings=LORA, trainable=True)
    randomise(roles, "policy", seed=2)
    ends = sorted(Request(prompts, settings(), tokenizer).ends(roles.causal_lm))
    for prompt, own in zip(prompts, beam(roles, "policy", prompts[:4], settings(), tokenizer, beams=3), strict=False):
        assert [each.ids for each in own] == transformers_beams(roles, "policy", prompt, 3, ends)


def test_a_model_whose_cache_is_unknown_is_computed_anew(tokenizer, prompts, caplog: pytest.LogCaptureFixture) -> None:
    roles = roles_of(MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=8, **SPECIAL))
    short = settings(max_new_tokens=5)
    found = beam(roles, "policy", prompts[:4], short, tokenizer, beams=2, groups=2)
    assert "computed anew at every step" in caplog.text
    for prompt, own in zip(prompts, found, strict=False):
        assert [each.ids for each in own] == [greedy(roles, "policy", prompt, 5, {tokenizer.eos_token_id})] * 2


def test_progress_and_what_makes_no_groups(roles: RoleModel, tokenizer, prompts) -> None:
    told: list[tuple[int, int]] = []
    beam(roles, "policy", prompts[:5], settings(batch_size=4, max_new_tokens=3), tokenizer, beams=2,
         tell=lambda *done: told.append(done))  # fmt: skip
    assert told == [(4, 10), (8, 10), (10, 10)]
    assert beam(roles, "policy", [], settings(), tokenizer, beams=2) == []
    with pytest.raises(ValueError, match="4 beams make no 3 groups"):
        beam(roles, "policy", prompts, settings(), tokenizer, beams=4, groups=3)
