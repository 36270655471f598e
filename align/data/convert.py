"""Records made of records: pairs of the candidates of a list, single answers of a pair, the best answer, the prompt."""

from __future__ import annotations

from align.data import select
from align.data.records import Conversation, Dropped, Message, Pair, Prompt, Ranked, Record, Samples, Unpaired
from align.spec.data import Conversion

PAIRS_OF_SCORES = {
    "all_pairs": select.all_pairs,
    "adjacent_pairs": select.adjacent,
    "best_worst": select.best_vs_worst,
    "tournament": select.tournament,
    "unpaired": select.best_vs_worst,
}
"""Which candidates of a list each conversion sets against each other."""


def convert(record: Record, how: Conversion | None) -> list[Record]:
    """What a record is made into; at least one record, for the scores of a list are never all the same.

    - ``all_pairs``: every two candidates of which one is better;
    - ``adjacent_pairs``: every two of different scores that follow one another when sorted, best first;
    - ``tournament``: neighbours of the list meet, then the winners, until one is left; those of equal scores make none;
    - ``best_worst``: the best and the worst;
    - ``unpaired``: both answers of a pair, or the best and the worst of a list, the better one first and desirable;
    - ``best``: a conversation that ends with the best answer.

    Of equals the earlier one counts as better. The pairs of a list have its target, or else its best as their target.
    """
    if how is None:
        return [record]
    if how == "best":
        return [_best(record)]
    if isinstance(record, Ranked):
        pairs = [_pair(record, a, b) for a, b in PAIRS_OF_SCORES[how](record.scores)]
    else:
        assert isinstance(record, Pair)
        pairs = [record]
    return [each for pair in pairs for each in _apart(pair)] if how == "unpaired" else list(pairs)


def as_prompt(record: Record) -> Prompt:
    """A record reduced to what comes before its last answer, with its answers beside it."""
    if isinstance(record, Prompt) and record.answers:
        return record
    if isinstance(record, Pair | Ranked | Samples | Unpaired):
        return Prompt(record.row, record.prompt, tuple(_answers(record).items()), _target(record))
    assert isinstance(record, Conversation | Prompt)
    answered = record.messages[-1]["role"] == "assistant"
    messages = record.messages[:-1] if answered else record.messages
    if not messages or messages[-1]["role"] != "user":
        raise Dropped("empty prompt")
    last = record.messages[-1:]
    return Prompt(record.row, messages, (("completion", last),), last) if answered else Prompt(record.row, messages)


def _answers(record: Pair | Ranked | Samples | Unpaired) -> dict[str, list[Message]]:
    """The answers of a record by what they are called; those of a list by their place."""
    if isinstance(record, Pair):
        return {"chosen": record.chosen, "rejected": record.rejected}
    if isinstance(record, Unpaired):
        return {"completion": record.completion}
    if isinstance(record, Ranked):
        return {str(place): response for place, response in enumerate(record.responses)}
    return {str(k): [Message(role="assistant", content=text)] for k, text in enumerate(record.responses)}


def _target(record: Pair | Ranked | Samples | Unpaired) -> list[Message] | None:
    """What the record says to stay close to, else its best answer; None where nothing tells which that is."""
    if isinstance(record, Unpaired):
        return record.completion if record.label else None
    if record.target is not None or isinstance(record, Samples):
        return record.target
    return record.chosen if isinstance(record, Pair) else record.responses[select.ranked(record.scores)[0]]


def _pair(record: Ranked, chosen: int, rejected: int) -> Pair:
    responses = record.responses
    target: list[Message] = record.target or responses[select.ranked(record.scores)[0]]
    return Pair(record.row, record.prompt, responses[chosen], responses[rejected], record.weight, target=target)


def _apart(pair: Pair) -> tuple[Unpaired, Unpaired]:
    return (
        Unpaired(pair.row, pair.prompt, pair.chosen, True, pair.weight),
        Unpaired(pair.row, pair.prompt, pair.rejected, False, pair.weight),
    )


def _best(record: Record) -> Conversation:
    assert isinstance(record, Pair | Ranked)
    best = record.chosen if isinstance(record, Pair) else record.responses[select.ranked(record.scores)[0]]
    return Conversation(record.row, [*record.prompt, *best], record.weight)
