"""The only place that applies a chat template and makes a mask of trained tokens.

A conversation is rendered to text, cut at the borders of the assistant's turns (`template.py`), and the pieces are
tokenised one by one. So the border between prompt and completion lies between two tokens by construction, the two
completions of a pair share their prompt token by token, and the ids of a prompt are those that generation starts from,
even where the tokenizer would have merged across the border.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

from align.data.records import (
    EMPTY,
    NO_TARGET,
    TIED,
    TOO_FEW,
    BadRow,
    Conversation,
    Dropped,
    Message,
    Pair,
    Prompt,
    Ranked,
    Record,
    Samples,
    Text,
    Unpaired,
    before_answer,
    digest,
    left_off,
)
from align.data.template import ChatTemplate, Piece
from align.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
LossOn = Literal["completion", "all"]

NEUTRAL = ("\n", "a", ":")
"""What a piece is tokenised behind if it merges with what really stands there; EOS, if it merges with all of these."""

NO_ROOM = "prompt leaves no room for a completion"
CUT_AWAY = "completion truncated away"
EQUAL = "chosen equals rejected after truncation"
EQUAL_TO_EARLIER = "equals an earlier one after truncation"
EQUAL_BUT_SCORED_APART = "equals one of another score after truncation"
TOO_LONG = "prompt longer than max_tokens"
CONTROL = "control token in the text"
REWRITTEN = "answer rewritten by the chat template"


@dataclass(frozen=True, slots=True)
class Completion:
    """What follows a prompt.

    Attributes:
        ids: Token ids; the last is EOS unless the completion is truncated.
        mask: Whether each token is trained.
        truncated: Whether it was cut, and so lost its EOS.
    """

    ids: list[int]
    mask: list[bool]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A record as token ids.

    Attributes:
        row: Number of the row it was made from.
        prompt_ids: Shared by all completions; with ``loss_on="all"`` the one token that nothing predicts.
        completions: One; chosen and rejected; the candidates of a ranked list, then its target if there is one; an
            unpaired completion, then another prompt's; none for a prompt.
        weight: Weight in the loss.
        group: The same for records of the same prompt; empty where only `prompt_ids` can tell.
        scores: One per candidate; of chosen and rejected 1 and 0; of an unpaired completion 1 if it is desirable.
        margin: By how much chosen is better than rejected, where the data says so.
    """

    row: int
    prompt_ids: list[int]
    completions: tuple[Completion, ...]
    weight: float
    group: bytes = b""
    scores: tuple[float, ...] = ()
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class _Layout:
    """A record as pieces: its prompt, and what follows in each completion. A text is a prompt alone.

    Attributes:
        scores: One per completion that is a candidate; the rest is a target.
        left_off: Why candidates are not among the completions.
    """

    record: Record
    prompt: Piece
    completions: tuple[tuple[Piece, ...], ...] = ()
    scores: tuple[float, ...] = ()
    left_off: tuple[str, ...] = ()


class ChatEncoder:
    """Turns records into examples.

    Args:
        tokenizer: With a chat template, unless only texts are encoded.
        max_tokens: Longest prompt + completion; longest prompt, for prompts alone.
        loss_on: Whether the assistant's turns are trained, or everything.
        target: Whether pairs and ranked lists keep their target, and are dropped if they have none.

    Raises:
        DataError: The tokenizer has no EOS.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        loss_on: LossOn = "completion",
        *,
        target: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token, so no completion could end", fix="set its eos_token")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.loss_on = loss_on
        self.target = target
        self.noted: Counter[str] = Counter()
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        # A padding token like "!" ends no turn; a text may hold it.
        special = {t for t in (*added, *tokenizer.all_special_tokens) if len(t) > 2 or t == tokenizer.eos_token}
        self._special = re.compile("|".join(re.escape(t) for t in sorted(special, key=len, reverse=True)))
        self._trailing_special = re.compile(rf"(?:\s*(?:{self._special.pattern}))+\s*\Z")

    def encode(self, record: Record) -> Example:
        """The example of one record.

        Raises:
            Dropped: Nothing is left to train.
            BadRow: The chat template refuses the conversation.
            DataError: The tokenizer has no chat template.
        """
        outcome = self.encode_many([record])[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def encode_many(self, records: Sequence[Record]) -> list[Example | Dropped | BadRow]:
        """The examples of records, or why there is none; the tokenizer is called once for all of them."""
        layouts = [_outcome(self._lay_out, record) for record in records]
        ids = self._tokenize(layout for layout in layouts if isinstance(layout, _Layout))
        return [layout if isinstance(layout, Exception) else _outcome(self._example, layout, ids) for layout in layouts]

    def prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of a prompt with the template's generation prompt, whatever its length."""
        layout = self._lay_out(Prompt(0, messages))
        return self._tokenize([layout])[layout.prompt]

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self._special)

    def _lay_out(self, record: Record) -> _Layout:
        if isinstance(record, Text):
            return _Layout(record, Piece(record.text))
        assert not isinstance(record, Samples), "nothing is trained on candidates before they are scored"
        if isinstance(record, Prompt):
            return _Layout(record, self._template.prompt(self._clean(record.messages)))
        if isinstance(record, Conversation):
            messages = self._clean(record.messages)
            prompt = before_answer(messages)
            return self._continued(record, prompt, [messages[len(prompt) :]])
        prompt = self._clean(record.prompt)
        if isinstance(record, Unpaired):
            return self._continued(record, prompt, [self._clean(record.completion)], (float(record.label),))
        target = self._target(record)
        if isinstance(record, Pair):
            sides = [self._clean(record.chosen), self._clean(record.rejected), *target]
            return self._continued(record, prompt, sides, (1.0, 0.0))
        cleaned = [_outcome(self._clean, response) for response in record.responses]
        kept = [(each, score) for each, score in zip(cleaned, record.scores, strict=True) if isinstance(each, list)]
        rules = tuple(each.rule for each in cleaned if isinstance(each, Dropped))
        sides, scores = [side for side, _ in kept], tuple(score for _, score in kept)
        return self._continued(record, prompt, [*sides, *target], scores, rules)

    def _continued(
        self,
        record: Record,
        prompt: list[Message],
        sides: Sequence[list[Message]],
        scores: tuple[float, ...] = (),
        rules: tuple[str, ...] = (),
    ) -> _Layout:
        start = self._template.prompt(prompt)
        pieces = tuple(self._template.continuation(start.text, prompt, side) for side in sides)
        return _Layout(record, start, pieces, scores, rules)

    def _target(self, record: Pair | Ranked) -> list[list[Message]]:
        """The target, if one is wanted."""
        if not self.target:
            return []
        if record.target is None:
            raise Dropped(NO_TARGET)
        return [self._clean(record.target)]

    def _clean(self, messages: Sequence[Message]) -> list[Message]:
        """Messages without the control tokens that data sets leave at the end of answers.

        Raises:
            Dropped: There are others, which would be read as the end of a turn or as a turn of somebody else.
        """
        cleaned = []
        for message in messages:
            content = message["content"]
            if self._special.search(content):
                content = self._trailing_special.sub("", content) if message["role"] == "assistant" else content
                if self._special.search(content):
                    raise Dropped(CONTROL)
                if not content.strip():
                    raise Dropped(EMPTY)
                self.noted["control token at the end of an answer left off"] += 1
            cleaned.append(Message(role=message["role"], content=content))
        return cleaned

    def _tokenize(self, layouts: Iterable[_Layout]) -> dict[Piece, list[int]]:
        """Token ids of every piece.

        A piece is tokenised behind what stands before it, so that it gets a prefix space or none as it would in the
        whole text, and those first tokens are taken off.
        """
        texts: dict[Piece, None] = {}
        pieces: dict[Piece, None] = {}
        for layout in layouts:
            if isinstance(layout.record, Text):
                texts[layout.prompt] = None
            else:
                pieces |= dict.fromkeys((layout.prompt, *(p for part in layout.completions for p in part)))
        ids = dict(zip(texts, self._ids([piece.text for piece in texts], whole=True), strict=True))
        contexts = sorted({piece.after for piece in pieces})
        before = dict(zip(contexts, self._ids(contexts), strict=True))
        for piece, found in zip(pieces, self._ids([piece.after + piece.text for piece in pieces]), strict=True):
            context = before[piece.after]
            ids[piece] = found[len(context) :] if found[: len(context)] == context else self._apart(piece.text)
        return ids

    def _apart(self, text: str) -> list[int]:
        """Token ids of a text that would merge with what stands before it: as within a text, but unmerged."""
        for context in NEUTRAL:
            before, found = self._ids([context, context + text])
            if found[: len(before)] == before:
                return found[len(before) :]
        return self._ids([str(self.tokenizer.eos_token) + text])[0][1:]

    def _ids(self, texts: list[str], *, whole: bool = False) -> list[list[int]]:
        """Token ids of texts; `whole` ones get what the tokenizer puts around a text (BOS)."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=whole, return_attention_mask=False, verbose=False)["input_ids"]

    def _example(self, layout: _Layout, ids: dict[Piece, list[int]]) -> Example:
        record = layout.record
        assert not isinstance(record, Samples)
        if isinstance(record, Text):
            return self._of_text(record, ids[layout.prompt])
        prompt_ids, group = ids[layout.prompt], digest(record.prompt)
        if isinstance(record, Prompt):
            if len(prompt_ids) > self.max_tokens:
                raise Dropped(TOO_LONG)
            return Example(record.row, prompt_ids, (), 1.0, group)
        if self.loss_on == "all" and isinstance(record, Conversation):
            flat = [*prompt_ids, *(i for piece in layout.completions[0] for i in ids[piece])]
            return self._of_all(record, flat, group)
        if isinstance(record, Ranked):
            return self._of_list(record, layout, ids, group)
        completions = tuple(self._completion(pieces, ids, len(prompt_ids)) for pieces in layout.completions)
        if isinstance(record, Pair) and completions[0].ids == completions[1].ids:
            raise Dropped(EQUAL)
        margin = record.margin if isinstance(record, Pair) else 0.0
        return Example(record.row, prompt_ids, completions, record.weight, group, layout.scores, margin)

    def _of_list(self, record: Ranked, layout: _Layout, ids: dict[Piece, list[int]], group: bytes) -> Example:
        """An example of the candidates that are of use, and of the target."""
        prompt_ids = ids[layout.prompt]
        found: dict[tuple[int, ...], list[tuple[Completion, float]]] = {}
        rules = list(layout.left_off)
        candidates = layout.completions[: len(layout.scores)]
        for pieces, score in zip(candidates, layout.scores, strict=True):
            candidate = _outcome(self._completion, pieces, ids, len(prompt_ids))
            if isinstance(candidate, Exception):
                rules.append(_rule_of_one(candidate))
            else:
                found.setdefault(tuple(candidate.ids), []).append((candidate, score))
        kept = []
        for equal in found.values():
            if len({score for _, score in equal}) == 1:
                kept.append(equal[0])
                rules += [EQUAL_TO_EARLIER] * (len(equal) - 1)
            else:  # what told them apart is cut away, so neither score is that of what is left
                rules += [EQUAL_BUT_SCORED_APART] * len(equal)
        scores = tuple(score for _, score in kept)
        if len(scores) < 2:
            raise Dropped(TOO_FEW)
        if len(set(scores)) == 1:
            raise Dropped(TIED)
        targets = [self._completion(each, ids, len(prompt_ids)) for each in layout.completions[len(layout.scores) :]]
        self.noted.update(map(left_off, rules))
        completions = (*(completion for completion, _ in kept), *targets)
        return Example(record.row, prompt_ids, completions, record.weight, group, scores)

    def _completion(self, pieces: Sequence[Piece], ids: dict[Piece, list[int]], prompt_tokens: int) -> Completion:
        tokens, mask = [], []
        for piece in pieces:
            tokens += ids[piece]
            mask += [piece.trained] * len(ids[piece])
        tokens.append(self.tokenizer.eos_token_id)
        mask.append(pieces[-1].trained)
        room = self.max_tokens - prompt_tokens
        if room <= 0:
            raise Dropped(NO_ROOM)
        if not any(mask[:room]):
            raise Dropped(CUT_AWAY if any(mask) else REWRITTEN)
        if rewritten := sum(piece.rewritten for piece in pieces):
            self.noted["turn rewritten by the chat template, not trained"] += rewritten
        return Completion(tokens[:room], mask[:room], len(tokens) > room)

    def _of_text(self, record: Text, ids: list[int]) -> Example:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        return self._of_all(record, ids, digest(record.prompt))

    def _of_all(self, record: Text | Conversation, ids: list[int], group: bytes) -> Example:
        """An example that is trained on everything but its first token."""
        ids = [*ids, self.tokenizer.eos_token_id]
        rest = ids[1 : self.max_tokens]
        if not rest:
            raise Dropped(CUT_AWAY if len(ids) > 1 else EMPTY)
        completion = Completion(rest, [True] * len(rest), len(ids) > self.max_tokens)
        return Example(record.row, ids[:1], (completion,), record.weight, group)


def _rule_of_one(error: Dropped | BadRow) -> str:
    """Why one candidate is left off its list.

    Raises:
        Dropped: The prompt is to blame, so that no other candidate fares better.
        BadRow: The row is malformed.
    """
    if isinstance(error, BadRow) or error.rule == NO_ROOM:
        raise error
    return error.rule


def _outcome(function: Callable[..., T], *args: object) -> T | Dropped | BadRow:
    try:
        return function(*args)
    except (Dropped, BadRow) as error:
        return error
