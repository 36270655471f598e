"""Rows that say which answer is better: pairs, votes on two answers, ranked lists, single answers with a label.

A candidate that says nothing, says it again or has no score is left off its list, which is noted; a list of which fewer
than two remain, or all with one score, is dropped. An answer that was judged more than once has the mean of its scores:
which of them stands first is chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from align.data.columns import Columns, as_messages, as_text, check_answer, check_turns
from align.data.records import (
    NO_SCORE,
    SAID_TWICE,
    TIED,
    TOO_FEW,
    BadRow,
    Dropped,
    Message,
    Pair,
    Ranked,
    Samples,
    Unpaired,
    left_off,
)
from align.data.sources import type_word

T = TypeVar("T")

PROMPTS = ("prompt", "conversations", "messages", "instruction")
"""Where a prompt may stand, in this order."""

ANSWER_KEYS = ("response", "text", "content", "output")
"""What the answer is called in the objects of a ranked list, unless `columns` says what `response` is."""

ANNOTATORS = ("annotator1", "annotator2", "annotator3")
TIE = 0

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""A label as text, in small letters -> whether the completion is desirable."""


def pair(number: int, columns: Columns) -> Pair:
    """`chosen` and `rejected`, as texts or as whole conversations, or `output` = [better, worse]."""
    chosen, rejected = _sides(columns)
    name, asked = columns.prompt("prompt", "conversations", "instruction")
    shared = _shared_prefix(chosen, rejected)
    if shared:
        # Both sides are whole conversations; a prompt beside them only says again how they begin.
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        said, asked = ([m for m in each if m["role"] != "system"] for each in (prompt, asked))
        if asked not in (said[: len(asked)], said[len(said) - len(asked) :]):
            raise BadRow(f"`chosen` and `rejected` do not continue `{name}`")
    elif asked:
        prompt = asked
    else:
        raise BadRow("no prompt: no column has one, and `chosen` and `rejected` do not begin alike")
    return _pair(number, columns, prompt, {"chosen": chosen, "rejected": rejected})


def _pair(number: int, columns: Columns, prompt: list[Message], sides: dict[str, list[Message]]) -> Pair:
    """A pair of two named answers, the better one first."""
    prompt = columns.with_system(prompt)
    for name, messages in sides.items():
        check_answer(prompt, messages, name)
    chosen, rejected = sides.values()
    if chosen == rejected:
        raise Dropped("chosen and rejected are the same")
    return Pair(number, prompt, chosen, rejected, columns.weight(), columns.margin(), columns.target(prompt))


def _sides(columns: Columns) -> tuple[list[Message], list[Message]]:
    """Chosen and rejected, from their columns or from a list [better, worse] in `output`."""
    if "chosen" in columns or "output" not in columns:
        return columns.messages("chosen", "assistant"), columns.messages("rejected", "assistant")
    answers = columns.get("output")
    if not isinstance(answers, list) or len(answers) != 2:
        raise BadRow("`output` is not a list of [better, worse]")
    better, worse = ([Message(role="assistant", content=as_text(each, "output"))] for each in answers)
    return better, worse


def _shared_prefix(chosen: list[Message], rejected: list[Message]) -> int:
    """How many leading messages two conversations share, up to a turn that the assistant answers."""
    shared = 0
    for a, b in zip(chosen[:-1], rejected[:-1], strict=False):
        if a != b:
            break
        shared += 1
    while shared and chosen[shared - 1]["role"] != "user":
        shared -= 1
    return shared


def labelled_pair(number: int, columns: Columns) -> Pair:
    """Two answers and which of them is better, by one label or by the majority of up to three annotators."""
    first, second = ("response1", "response2") if "response1" in columns.values else ("output_1", "output_2")
    if "input" in columns and columns.first(*PROMPTS) is None:
        prompt = columns.messages("input", "user")
    else:
        prompt = _asked(columns)
    sides = {name: columns.messages(name, "assistant") for name in (first, second)}
    better = _better(columns)
    return _pair(number, columns, prompt, sides if better == 1 else {second: sides[second], first: sides[first]})


def _asked(columns: Columns) -> list[Message]:
    name, prompt = columns.prompt(*PROMPTS)
    return prompt if name else columns.messages("prompt", "user")


def _better(columns: Columns) -> int:
    """1 or 2.

    Raises:
        Dropped: There is no judgement, or none for either of them.
    """
    one = [name for name in ("label", "preference") if name in columns.values][:1]
    names = one or [name for name in ANNOTATORS if name in columns.values] or ["label"]
    votes = Counter(vote for name in names if (vote := _vote(columns, name)) is not None)
    if not votes:
        raise Dropped("no judgement")
    better, count = votes.most_common(1)[0]
    if 2 * count <= votes.total():
        raise Dropped("no majority")
    if better == TIE:
        raise Dropped("tie")
    return better


def _vote(columns: Columns, name: str) -> int | None:
    """1, 2 or a tie; None where the judgement failed. A number between 1 and 2 counts for the nearer one."""
    value = columns.get(name)
    if value is None or value == "":
        return None
    try:
        vote = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        vote = math.nan
    columns.saw_label(vote)
    if vote in (0, 1.5):
        return TIE
    if not 1 <= vote <= 2:
        raise BadRow(f"`{name}` is not 1 or 2, or 0 or 1.5 for a tie")
    return 1 if vote < 1.5 else 2


def ranked(number: int, columns: Columns) -> Ranked:
    """Answers with scores: in two lists, in one list of objects, or in one list that begins with the best."""
    prompt = _asked(columns)
    name = "responses" if "responses" in columns or "output" not in columns else "output"
    items = columns.items(name)
    answers = [_answer(columns, item, name) for item in items]
    return _ranked(number, columns, prompt, answers, _scores(columns, items, name))


def _is_message(item: dict[str, Any]) -> bool:
    return {"role", "content"} <= item.keys() or {"from", "value"} <= item.keys()


def _answer(columns: Columns, item: Any, name: str) -> list[Message]:
    if not isinstance(item, dict) or _is_message(item):
        return as_messages(item, name, "assistant")
    keys = (columns.names["response"],) if "response" in columns.names else ANSWER_KEYS
    key = next((each for each in keys if each in item), None)
    if key is None:
        raise BadRow(f"a candidate of `{name}` has no `{keys[0]}`")
    return as_messages(item[key], f"{name}.{key}", "assistant")


def _scores(columns: Columns, items: Sequence[Any], name: str) -> list[float | None]:
    """Scores of a list of candidates, None where there is no judgement."""
    key = columns.names.get("score", "score")
    if "scores" in columns.values:
        scores = columns.items("scores")
        if len(scores) != len(items):
            raise BadRow(f"`scores` and `{name}` differ in length")
        return [_score(each, "scores") for each in scores]
    objects = [item for item in items if isinstance(item, dict)]
    if any(key in item for item in objects):
        return [_score(item.get(key), key) if isinstance(item, dict) else None for item in items]
    if "score" in columns.names or not all(map(_is_message, objects)):
        raise BadRow(f"no candidate of `{name}` has `{key}`")
    columns.note("list without scores read as best first")
    return [-float(place) for place in range(len(items))]


def _score(value: Any, name: str) -> float | None:
    """A score, None where it is missing."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"`{name}` has {type_word(value)}, not a number")
    if math.isinf(value):
        raise BadRow(f"`{name}` has an infinite number")
    return None if math.isnan(value) else float(value)


def mt_bench(number: int, columns: Columns) -> Ranked:
    """Whole conversations on the questions in `turns`, each with the mean of its `scores`; -1 is a failed judgement."""
    questions = [as_text(each, "turns") for each in columns.items("turns")]
    answers, scores = [], []
    for candidate in columns.items("candidates"):
        said, points = (_for_each_question(candidate, name, len(questions)) for name in ("turns", "scores"))
        texts = [as_text(each, "candidates.turns") for each in said]
        turns = [
            (Message(role="user", content=q), Message(role="assistant", content=a))
            for q, a in zip(questions, texts, strict=True)
        ]
        answers.append([message for turn in turns for message in turn][1:])
        judged = [score for each in points if (score := _score(each, "candidates.scores")) is not None and score >= 0]
        scores.append(sum(judged) / len(judged) if len(judged) == len(questions) else None)
    return _ranked(number, columns, [Message(role="user", content=questions[0])], answers, scores)


def _for_each_question(candidate: Any, name: str, questions: int) -> list[Any]:
    if not isinstance(candidate, dict):
        raise BadRow(f"a candidate of `candidates` is {type_word(candidate)}, not an object")
    found = candidate.get(name)
    if not isinstance(found, list) or len(found) != questions:
        raise BadRow(f"the `{name}` of a candidate are not one for each question")
    return found


def _ranked(
    number: int,
    columns: Columns,
    prompt: list[Message],
    answers: Sequence[list[Message]],
    scores: Sequence[float | None],
) -> Ranked:
    """A list of the candidates that are of use."""
    prompt = columns.with_system(prompt)
    check_turns(prompt, "prompt")
    kept: list[list[Message]] = []
    judged: list[list[float]] = []
    rules: list[str] = []
    for answer, score in zip(answers, scores, strict=True):
        try:
            check_answer(prompt, answer, "candidate")
        except Dropped as error:
            rules.append(error.rule)
            continue
        if score is None:
            rules.append(NO_SCORE)
        elif answer in kept:
            rules.append(SAID_TWICE)
            judged[kept.index(answer)].append(score)
        else:
            kept.append(answer)
            judged.append([score])
    if len(kept) < 2:
        raise Dropped(TOO_FEW)
    points = [own[0] if len(set(own)) == 1 else sum(own) / len(own) for own in judged]
    if len(set(points)) == 1:
        raise Dropped(TIED)
    record = Ranked(number, prompt, kept, points, columns.target(prompt), columns.weight())
    for rule in rules:
        columns.note(left_off(rule))
    for own in judged:
        if len(set(own)) > 1:
            columns.note("answer with several scores has their mean")
    return record


def samples(number: int, columns: Columns) -> Samples:
    """Answers of one turn each in the forms of a ranked list, kept as they are: scored or not, empty or said twice."""
    prompt = columns.with_system(_asked(columns))
    check_turns(prompt, "prompt")
    if prompt[-1]["role"] != "user":
        raise BadRow("`prompt` does not end with the user")
    name = "responses" if "responses" in columns or "output" not in columns else "output"
    items = columns.items(name)
    answers = [_answer(columns, item, name) for item in items]
    if any(len(answer) > 1 or answer[0]["role"] != "assistant" for answer in answers):
        raise BadRow(f"a candidate of `{name}` is not one turn of the assistant")
    key = columns.names.get("score", "score")
    scored = "scores" in columns.values or any(isinstance(item, dict) and key in item for item in items)
    return Samples(
        number,
        prompt,
        [answer[0]["content"] for answer in answers],
        _beside(columns, "sources", len(items), str, ""),
        _beside(columns, "ended", len(items), bool, True),
        _scores(columns, items, name) if scored else None,
        columns.target(prompt),
    )


def _beside(columns: Columns, name: str, count: int, kind: type[T], absent: T) -> list[T]:
    """A list with one value for each candidate."""
    if name not in columns:
        return [absent] * count
    values = columns.items(name)
    if len(values) != count or not all(isinstance(each, kind) for each in values):
        raise BadRow(f"`{name}` is not one {'text' if kind is str else 'true or false'} for each candidate")
    return values


def unpaired(number: int, columns: Columns) -> Unpaired:
    """One answer with a label: `prompt` and `completion`, the end of a conversation, or an instruction's `output`."""
    name = columns.first("messages", "conversations")
    if "completion" in columns.values or (name is None and "instruction" not in columns):
        prompt, completion = columns.messages("prompt", "user"), columns.messages("completion", "assistant")
    elif name is None:
        prompt, completion = columns.instruction(), [Message(role="assistant", content=columns.text("output"))]
    else:
        messages = columns.messages(name)
        prompt, completion = messages[:-1], messages[-1:]
        if completion[0]["role"] != "assistant":
            raise BadRow(f"`{name}` does not end with the assistant")
        if not prompt:
            raise BadRow(f"`{name}` has no prompt")
    prompt = columns.with_system(prompt)
    check_answer(prompt, completion, "completion")
    label = LABELS.get(str(columns.get("label")).lower())
    if label is None:
        raise BadRow("`label` is not true or false")
    return Unpaired(number, prompt, completion, label, columns.weight())
