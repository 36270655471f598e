"""Ranked lists, pairs and single answers as token ids: candidates, scores, targets, another prompt's completion."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from align.data import DataReport, Example, load_examples
from align.data.chat import CONTROL, CUT_AWAY, NO_ROOM, ChatEncoder, Completion
from align.data.check import first_examples
from align.data.mismatch import with_mismatched
from align.data.records import BadRow, Dropped, Pair, Ranked, Unpaired
from align.data.report import contradictions, token_statistics
from align.errors import DataError
from align.spec.data import FileData
from align.types import Batch
from tests.data.conversations import conversation, record, texts
from tests.data.tokenizers import PLAIN, tokenizer_of

LONG = 4096
WHY = conversation("why")

some = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def answer(*turns: str) -> list[Any]:
    return conversation("", *turns)[1:]


def ranked(*said: str, scores: tuple[float, ...] = (), **more: Any) -> Ranked:
    return Ranked(7, WHY, [answer(each) for each in said], list(scores or range(len(said))), **more)


def room(name: str, tokens: int) -> int:
    """`max_tokens` that leave this many to the answers to "why"."""
    return len(ChatEncoder(tokenizer_of(name), LONG).prompt(WHY)) + tokens


@pytest.mark.parametrize("name", PLAIN)
@some
@given(prompt=texts, said=st.lists(texts, min_size=2, max_size=5, unique_by=str.strip))
def test_candidates_share_their_prompt_and_are_encoded_as_if_alone(name: str, prompt: str, said: list[str]) -> None:
    encoder = ChatEncoder(tokenizer_of(name), LONG)
    alone = [encoder.encode(record(prompt, each)) for each in said]
    assume(len({tuple(each.completions[0].ids) for each in alone}) == len(said))
    scores = [float(k) for k in range(len(said))]
    example = encoder.encode(Ranked(7, conversation(prompt), [answer(each) for each in said], scores, weight=2.0))
    assert example.prompt_ids == encoder.prompt(conversation(prompt))
    assert example.completions == tuple(each.completions[0] for each in alone)
    assert (example.row, example.weight, example.scores) == (7, 2.0, tuple(scores))
    assert example.group == encoder.encode(record(prompt, said[0])).group


def test_targets_are_kept_where_they_are_wanted_and_left_off_elsewhere() -> None:
    tokenizer = tokenizer_of("chatml")
    without, wanted = ChatEncoder(tokenizer, LONG), ChatEncoder(tokenizer, LONG, target=True)
    pair = Pair(7, WHY, answer("so"), answer("no"), margin=0.5, target=answer("thus"))
    for made in (ranked("so", "no", scores=(1.0, 0.0), target=answer("thus")), pair):
        plain, example = without.encode(made), wanted.encode(made)
        assert example.completions == (*plain.completions, without.encode(record("why", "thus")).completions[0])
        assert example.scores == plain.scores == (1.0, 0.0)
        assert example.margin == plain.margin == (0.5 if made is pair else 0.0)
    for made in (ranked("so", "no"), Pair(7, WHY, answer("so"), answer("no"))):
        assert len(without.encode(made).completions) == 2
        with pytest.raises(Dropped, match="no target"):
            wanted.encode(made)
    with pytest.raises(Dropped, match=CONTROL):
        wanted.encode(ranked("so", "no", target=answer("<|im_end|> so")))
    assert without.encode(ranked("so", "no", target=answer("<|im_end|> so"))).completions


def test_candidates_that_are_equal_when_cut_are_left_off() -> None:
    encoder = ChatEncoder(tokenizer_of("chatml"), room("chatml", 3))
    example = encoder.encode(ranked("yes yes yes no", "no", "yes yes yes yes", scores=(3.0, 1.0, 3.0)))
    assert example.scores == (3.0, 1.0)
    assert len(example.completions) == 2
    assert encoder.noted == {"candidate left off: equals an earlier one after truncation": 1}
    with pytest.raises(Dropped, match="fewer than two candidates"):
        encoder.encode(ranked("yes yes yes no", "yes yes yes yes"))
    with pytest.raises(Dropped, match="all candidates tied"):
        encoder.encode(ranked("yes yes yes no", "yes yes yes yes", "no", "so", scores=(1.0, 2.0, 1.0, 1.0)))
    assert encoder.noted.total() == 1, "what is left off a list that is dropped is not told"


def test_candidates_that_are_equal_when_cut_but_scored_apart_give_no_order() -> None:
    encoder = ChatEncoder(tokenizer_of("chatml"), room("chatml", 3))
    said = ("yes yes yes no", "no", "yes yes yes yes", "so", "yes yes yes so")
    example = encoder.encode(ranked(*said, scores=(3.0, 1.0, 0.0, 2.0, 3.0)))
    alone = [encoder.encode(record("why", each)).completions[0] for each in ("no", "so")]
    assert example.scores == (1.0, 2.0)
    assert example.completions == tuple(alone)
    assert encoder.noted == {"candidate left off: equals one of another score after truncation": 3}
    with pytest.raises(Dropped, match="fewer than two candidates"):
        encoder.encode(ranked(*said[:3], scores=(3.0, 1.0, 0.0)))


def test_candidates_with_control_tokens_are_left_off() -> None:
    encoder = ChatEncoder(tokenizer_of("chatml"), LONG)
    example = encoder.encode(ranked("so", "<|im_start|>user\nhm", "<|im_end|>", "no <|im_end|>"))
    assert example.scores == (0.0, 3.0)
    assert encoder.noted == {
        "candidate left off: control token in the text": 1,
        "candidate left off: empty completion": 1,
        "control token at the end of an answer left off": 1,
    }
    with pytest.raises(Dropped, match=CONTROL):
        encoder.encode(Ranked(7, conversation("<|im_end|> why"), [answer("so"), answer("no")], [1.0, 2.0]))


def test_a_prompt_that_leaves_no_room_drops_the_list() -> None:
    with pytest.raises(Dropped, match=NO_ROOM):
        ChatEncoder(tokenizer_of("chatml"), room("chatml", 0)).encode(ranked("so", "no"))


def test_a_template_that_refuses_a_candidate_refuses_the_row() -> None:
    encoder = ChatEncoder(tokenizer_of("opens-thoughts"), LONG)
    with pytest.raises(BadRow, match="rewrites earlier turns"):
        encoder.encode(Ranked(7, WHY, [answer("so"), answer("no", "how", "not")], [1.0, 2.0]))


def test_a_target_of_which_nothing_trained_is_left_drops_the_list() -> None:
    encoder = ChatEncoder(tokenizer_of("strips-thoughts"), room("strips-thoughts", 40), target=True)
    rewritten = answer("<think>\nhm\n</think>\n\nso", "how " * 99, "thus")
    assert encoder.encode(ranked("so", "no", target=answer("thus"))).completions[2].ids
    with pytest.raises(Dropped, match=CUT_AWAY):
        encoder.encode(ranked("so", "no", target=rewritten))


def test_loss_on_all_is_for_conversations_alone() -> None:
    encoder = ChatEncoder(tokenizer_of("chatml"), LONG, "all")
    for made in (ranked("so", "no"), Unpaired(7, WHY, answer("so"), True)):
        assert encoder.encode(made).prompt_ids == encoder.prompt(WHY)


@pytest.mark.parametrize("label", [True, False])
def test_a_single_answer_has_its_label_as_score(label: bool) -> None:
    encoder = ChatEncoder(tokenizer_of("chatml"), LONG)
    example = encoder.encode(Unpaired(7, WHY, answer("so"), label, 3.0))
    assert example.completions == encoder.encode(record("why", "so")).completions
    assert (example.scores, example.weight) == ((float(label),), 3.0)


# Another prompt's completion ---------------------------------------------------------------------------------------


def single(group: int, length: int = 3, prompt: int = 2) -> Example:
    return Example(
        0, [group] * prompt, (Completion([group] * length, [True] * length, False),), 1.0, b"%d" % group, (1.0,)
    )


def test_mismatched_completions_are_desirable_as_often_as_the_data_is() -> None:
    """Pairs turned into rows have the desirable completion of every prompt first."""
    rows = [replace(single(group, length=2 + k), scores=(1.0 - k,)) for group in range(5) for k in range(2)]
    lengths = [len(example.completions[1].ids) for example in with_mismatched(rows, 99)]
    assert sorted(lengths) == sorted(len(row.completions[0].ids) for row in rows)


@given(groups=st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(lambda groups: len(set(groups)) > 1))
def test_the_mismatched_completion_is_that_of_the_next_example_of_another_prompt(groups: list[int]) -> None:
    made = with_mismatched([single(group) for group in groups], 99)
    for i, example in enumerate(made):
        following = [*groups[i + 1 :], *groups[:i]]
        expected = next(group for group in following if group != groups[i])
        assert [completion.ids[0] for completion in example.completions] == [groups[i], expected]


def test_the_mismatched_completion_is_cut_to_the_room_beside_its_own_prompt() -> None:
    first, second = with_mismatched([single(0, prompt=5), single(1, length=8)], 10)
    assert first.completions[1] == Completion([1] * 5, [True] * 5, True)
    assert second.completions[1] == Completion([0] * 3, [True] * 3, False)


def test_examples_of_one_prompt_have_no_mismatched_completion() -> None:
    with pytest.raises(DataError, match="all 2 examples have one prompt"):
        with_mismatched([single(0), single(0)], 99)
    assert with_mismatched([], 99) == []


# From a file to examples -------------------------------------------------------------------------------------------


def rows(path: Path, *given: Any, **more: Any) -> FileData:
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return FileData(**({"path": str(path)} | more))


def load(source: FileData, batch: Batch, **options: Any) -> tuple[list[Example], DataReport]:
    defaults: dict[str, Any] = {"tokenizer": tokenizer_of("chatml"), "max_tokens": 512, "folder": Path()}
    return load_examples(source, batch=batch, **(defaults | options))


LABELLED = [
    {"prompt": prompt, "completion": completion, "label": label}
    for prompt, completion, label in [("a", "1", True), ("a", "2", False), ("b", "3", True), ("b", "3", False)]
]


def test_unpaired_examples(tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", *LABELLED, format="unpaired")
    tokenizer = tokenizer_of("chatml")
    examples, report = load(source, Batch.UNPAIRED)
    said = [[tokenizer.decode(c.ids[:-1]) for c in example.completions] for example in examples]
    assert said == [["1", "3"], ["2", "3"], ["3", "1"], ["3", "2"]]
    assert [example.scores for example in examples] == [(1.0,), (0.0,), (1.0,), (0.0,)]
    assert (report.examples, report.desirable, report.candidates, report.contradictions) == (4, 2, 0, 2)
    assert set(report.tokens) == {"prompt", "completion", "total"}


def test_truncation_is_told_of_own_completions_alone(tmp_path: Path) -> None:
    long = {"prompt": "a", "completion": "the sea is wide " * 9, "label": True}
    source = rows(tmp_path / "rows.jsonl", long, *LABELLED[2:], format="unpaired")
    examples, report = load(source, Batch.UNPAIRED, max_tokens=20)
    assert report.truncated == 1
    assert [[c.truncated for c in example.completions] for example in examples] == [
        [True, False],
        [False, True],
        [False, True],
    ]


def test_single_answers_need_two_prompts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 2 examples have one prompt"):
        load(rows(tmp_path / "rows.jsonl", *LABELLED[:2], format="unpaired"), Batch.UNPAIRED)


def test_the_first_examples_have_the_completions_that_training_gives_them(tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", *LABELLED, format="unpaired")
    options: dict[str, Any] = {"batch": Batch.UNPAIRED, "tokenizer": tokenizer_of("chatml"), "max_tokens": 99}
    whole, _ = load(source, Batch.UNPAIRED, max_tokens=99)
    for count in (1, 2, 3, 4, 9):
        assert first_examples(source, count, folder=tmp_path, **options) == whole[:count]


RANKED = [
    {"prompt": "a", "responses": ["1", "2", "3"], "scores": [3, 2, 1], "target": "4"},
    {"prompt": "b", "responses": ["1", "2"], "scores": [0, 0.5]},
    {"prompt": "a", "responses": ["2", "1"], "scores": [7, 5], "target": "4"},
]


def test_ranked_examples(tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", *RANKED, format="ranked")
    examples, report = load(source, Batch.RANKED)
    assert [len(example.completions) for example in examples] == [3, 2, 2]
    assert [example.scores for example in examples] == [(3.0, 2.0, 1.0), (0.0, 0.5), (7.0, 5.0)]
    assert (report.examples, report.candidates, report.contradictions) == (3, 7, 2)
    assert set(report.tokens) == {"prompt", "candidate", "total"}


def test_all_ranked_examples_have_a_target_or_none_has(tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", *RANKED, format="ranked")
    examples, report = load(source, Batch.RANKED, target=True)
    assert [len(e.completions) - len(e.scores) for e in examples] == [1, 1]
    assert report.dropped == {"no target": 1}
    assert set(report.tokens) == {"prompt", "candidate", "target", "total"}
    first = first_examples(
        source, 1, batch=Batch.RANKED, tokenizer=tokenizer_of("chatml"), max_tokens=99, target=True, folder=tmp_path
    )
    assert first == examples[:1]


def test_pairs_are_lists_of_two_and_pairs_of_a_list_have_its_best_as_target(tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", RANKED[1], RANKED[0], format="ranked", convert="all_pairs")
    examples, report = load(source, Batch.RANKED, target=True)
    said = [[tokenizer_of("chatml").decode(c.ids[:-1]) for c in example.completions] for example in examples]
    assert said == [["2", "1", "2"], ["1", "2", "4"], ["1", "3", "4"], ["2", "3", "4"]]
    assert {example.scores for example in examples} == {(1.0, 0.0)}
    assert set(report.tokens) == {"prompt", "chosen", "rejected", "target", "total"}
    paired, _ = load(source, Batch.PAIRED, target=True)
    assert {len(example.completions) for example in paired} == {2}, "a target has no place in a pair"


def test_lengths_of_nothing() -> None:
    assert token_statistics([]) == {}
    assert contradictions([]) == 0


def test_labels_that_can_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    """0 and 1 alone may mean the first and the second answer, or a tie and the first."""
    voted = [{"input": f"why {i}", "output_1": "so", "output_2": "no", "label": i % 2} for i in range(6)]
    with pytest.raises(DataError, match="0 and 1"):
        load(rows(tmp_path / "rows.jsonl", *voted, format="labelled_pairs"), Batch.PAIRED)
    voted[0]["label"] = 2
    assert load(rows(tmp_path / "more.jsonl", *voted, format="labelled_pairs"), Batch.PAIRED)[1].examples == 4
