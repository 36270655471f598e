from __future__ import annotations

import pytest

from align.rollout.stops import Stops


def ids_of(tokenizer, text: str, pieces: list[str] | None = None) -> list[int]:
    """Token ids of a text, with token borders where `pieces` have them."""
    return [i for piece in (pieces or [text]) for i in tokenizer(piece, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize(
    ("pieces", "string"),
    [
        (["The film", " was slow"], "was"),
        (["a", "b", "c", "d"], "bc"),
        (["x\n", "\nQuestion"], "\n\nQ"),
        (["caf", "é", " nice"], "é n"),
        (["한", "국", "어"], "국어"),
        (["🙂🙃", "🙂"], "🙃🙂"),
        (["long " * 30, "end"], "g end"),
    ],
)
def test_a_string_ends_with_the_token_that_completes_it(tokenizer, pieces: list[str], string: str) -> None:
    ids, stops = ids_of(tokenizer, "", pieces), Stops([string], tokenizer)
    expected = next(n for n in range(len(ids) + 1) if string in tokenizer.decode(ids[:n]))
    assert stops.first(ids) == expected
    assert stops.reached([ids[:expected], ids[: expected - 1]]) == [True, False]


def test_any_of_several_and_none(tokenizer) -> None:
    ids = ids_of(tokenizer, "The film was slow")
    assert Stops(["nothing", "film"], tokenizer).first(ids) == Stops(["film"], tokenizer).first(ids)
    assert Stops(["nothing"], tokenizer).first(ids) is None
    assert not Stops([], tokenizer)
    assert Stops([], tokenizer).reached([ids]) == [False]
    assert Stops(["a"], tokenizer).reached([]) == []


def test_a_special_token_can_be_named(tokenizer) -> None:
    ids = [*ids_of(tokenizer, "yes"), tokenizer.convert_tokens_to_ids("<|im_start|>"), *ids_of(tokenizer, "no")]
    assert Stops(["<|im_start|>"], tokenizer).first(ids) == len(ids_of(tokenizer, "yes")) + 1
