"""Masks, borders and ends of turns, over every family of tokenizer and template.

The oracle is transformers' own `apply_chat_template` on the whole conversation, wherever it is unambiguous.
"""

from __future__ import annotations

import logging
import re
from copy import copy

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from align.data.chat import CONTROL, CUT_AWAY, EMPTY, EQUAL, NO_ROOM, REWRITTEN, TOO_LONG, ChatEncoder, Example
from align.data.records import BadRow, Conversation, Dropped, Pair, Prompt, Text
from align.errors import DataError
from tests.data.conversations import conversation, record, texts
from tests.data.tokenizers import CHATML, GLUED, IM, MAKERS, MARKED, PLAIN, byte_level, tokenizer_of

LONG = 4096

every = pytest.mark.parametrize("name", list(MAKERS))
every_plain = pytest.mark.parametrize("name", PLAIN)
some = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def ids_of(tokenizer, messages, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


def trained(example: Example) -> list[list[int]]:
    """Runs of trained tokens of the first completion."""
    completion, runs, before = example.completions[0], [], False
    for token, on in zip(completion.ids, completion.mask, strict=True):
        if on and not before:
            runs.append([])
        if on:
            runs[-1].append(token)
        before = on
    return runs


@every
@some
@given(question=texts, answer=texts)
def test_one_turn_is_what_the_template_writes(name: str, question: str, answer: str) -> None:
    tokenizer = tokenizer_of(name)
    messages = conversation(question, answer)
    example = ChatEncoder(tokenizer, LONG).encode(Conversation(3, messages))
    (completion,) = example.completions
    prompt = ids_of(tokenizer, messages[:1], add_generation_prompt=True)
    assert example.prompt_ids == prompt
    assert example.row == 3
    assert not completion.truncated
    assert completion.ids[-1] == tokenizer.eos_token_id
    assert completion.ids.count(tokenizer.eos_token_id) == 1
    assert completion.mask == [True] * len(completion.ids)

    # What the template writes after the answer is no text of the answer: with no end marker it may merge with it.
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    if whole[: len(prompt)] == prompt:
        rest = whole[len(prompt) :]
        assert rest[: len(completion.ids) - 1] == completion.ids[:-1]
        assert rest[len(completion.ids) - 1 :] in ([], [tokenizer.eos_token_id])
    words = tokenizer.decode(completion.ids, skip_special_tokens=True)
    assert answer.strip() in words


@every_plain
@some
@given(turns=st.lists(texts, min_size=4, max_size=8).filter(lambda turns: len(turns) % 2 == 0))
def test_every_answer_of_several_turns_is_trained_and_nothing_else(name: str, turns: list[str]) -> None:
    tokenizer = tokenizer_of(name)
    example = ChatEncoder(tokenizer, LONG).encode(record(*turns))
    assert example.prompt_ids == ids_of(tokenizer, conversation(*turns)[:1], add_generation_prompt=True)
    runs = [tokenizer.decode(run, skip_special_tokens=True) for run in trained(example)]
    assert len(runs) == len(turns) // 2
    for run, answer in zip(runs, turns[1::2], strict=True):
        assert answer.strip() in run
        assert len(run.strip()) <= len(answer.strip())
    ends = [run[-1] for run in trained(example)]
    assert len(set(ends[:-1])) <= 1 or "no-eos" in name, "every turn ends with the same token"
    assert ends[-1] == tokenizer.eos_token_id


@every_plain
@some
@given(turns=st.lists(texts, min_size=4, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
def test_pieces_add_up_to_the_whole_text(name: str, turns: list[str]) -> None:
    tokenizer = tokenizer_of(name)
    example = ChatEncoder(tokenizer, LONG).encode(record(*turns))
    whole = tokenizer.decode(ids_of(tokenizer, conversation(*turns)))
    start = tokenizer.decode(example.prompt_ids + example.completions[0].ids[:-1])
    assert whole[: len(start)] == start
    assert whole[len(start) :].strip() in ("", tokenizer.eos_token)


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "zephyr-merging"])
def test_ordinary_words_are_tokenised_as_in_the_whole(name: str) -> None:
    tokenizer = tokenizer_of(name)
    turns = ("What is the sea?", "The sea is wide, and it was dull.", "Is it 12 or 3?", "No: the answer is 3")
    example = ChatEncoder(tokenizer, LONG).encode(record(*turns))
    ids = example.prompt_ids + example.completions[0].ids[:-1]
    assert ids == ids_of(tokenizer, conversation(*turns))[: len(ids)]


@pytest.mark.parametrize("name", MARKED)
@some
@given(
    turns=st.lists(texts, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0), system=st.none() | texts
)
def test_generation_marks_and_turn_by_turn_rendering_agree(name: str, turns: list[str], system: str | None) -> None:
    marked, unmarked = tokenizer_of(name), copy(tokenizer_of(name))
    unmarked.chat_template = re.sub(r"\{% (end)?generation %\}", "", marked.chat_template)
    conversation_ = record(*turns, system=system)
    assert ChatEncoder(marked, LONG).encode(conversation_) == ChatEncoder(unmarked, LONG).encode(conversation_)


@some
@given(turns=st.lists(texts, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
def test_the_mask_is_the_assistant_mask_of_transformers(turns: list[str]) -> None:
    tokenizer = tokenizer_of("chatml-marks-end")
    example = ChatEncoder(tokenizer, LONG).encode(record(*turns))
    whole = tokenizer.apply_chat_template(conversation(*turns), return_assistant_tokens_mask=True)
    ids = example.prompt_ids + example.completions[0].ids
    assume(ids == whole["input_ids"][: len(ids)])
    mask = [0] * len(example.prompt_ids) + [int(on) for on in example.completions[0].mask]
    assert mask == whole["assistant_masks"][: len(ids)]


def test_marks_may_leave_a_part_of_the_turn_untrained() -> None:
    template = CHATML.replace(
        "m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
        "m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{{ '<think>\n</think>\n' }}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    tokenizer = byte_level(template, IM, eos="<|im_end|>")
    example = ChatEncoder(tokenizer, LONG).encode(record("why", "because", "how", "so"))
    assert [tokenizer.decode(run) for run in trained(example)] == ["because<|im_end|>", "so<|im_end|>"]
    assert tokenizer.decode(example.completions[0].ids).startswith("<think>\n</think>\nbecause")
    sides = (conversation("", side)[1:] for side in ("so", "no"))
    pair = ChatEncoder(tokenizer, LONG).encode(Pair(0, conversation("why", "because", "how"), *sides))
    assert tokenizer.decode(pair.completions[0].ids) == "<think>\n</think>\nso<|im_end|>"
    assert [tokenizer.decode(run) for run in trained(pair)] == ["so<|im_end|>"]


@every_plain
@some
@given(prompt=texts, chosen=texts, rejected=texts)
def test_a_pair_shares_its_prompt_token_by_token(name: str, prompt: str, chosen: str, rejected: str) -> None:
    encoder = ChatEncoder(tokenizer_of(name), LONG)
    sides = [conversation("", side)[1:] for side in (chosen, rejected)]
    assume(chosen.strip() != rejected.strip())
    example = encoder.encode(Pair(0, conversation(prompt), *sides))
    for completion, side in zip(example.completions, (chosen, rejected), strict=True):
        alone = encoder.encode(record(prompt, side))
        assert alone.prompt_ids == example.prompt_ids == encoder.prompt(conversation(prompt))
        assert alone.completions == (completion,)


@every_plain
def test_answers_in_the_prompt_of_a_pair_are_not_trained(name: str) -> None:
    tokenizer = tokenizer_of(name)
    prompt = conversation("why", "because", "how")
    example = ChatEncoder(tokenizer, LONG).encode(Pair(0, prompt, *(conversation("", x)[1:] for x in ("so", "no"))))
    assert example.prompt_ids == ids_of(tokenizer, prompt, add_generation_prompt=True)
    for completion, words in zip(example.completions, ("so", "no"), strict=True):
        assert tokenizer.decode(completion.ids, skip_special_tokens=True).strip() == words
        assert all(completion.mask)


def test_a_merge_across_the_border_is_taken_apart() -> None:
    tokenizer = tokenizer_of("glued")
    example = ChatEncoder(tokenizer, LONG).encode(record("ques", "tion"))
    whole = tokenizer("question", add_special_tokens=False)["input_ids"]
    alone = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in ("ques", "tion")]
    assert alone[0] + alone[1] != whole, "the tokenizer has no merge across this border"
    assert [example.prompt_ids, example.completions[0].ids[:-1]] == alone


@every
def test_max_tokens_cuts_the_completion_and_its_eos(name: str) -> None:
    tokenizer = tokenizer_of(name)
    whole = ChatEncoder(tokenizer, LONG).encode(record("why is it", "the answer is 1 and 2"))
    prompt, completion = len(whole.prompt_ids), whole.completions[0]
    for max_tokens in range(prompt + 1, prompt + len(completion.ids)):
        cut = ChatEncoder(tokenizer, max_tokens).encode(record("why is it", "the answer is 1 and 2"))
        assert cut.prompt_ids == whole.prompt_ids
        assert cut.completions[0].ids == completion.ids[: max_tokens - prompt]
        assert len(cut.completions[0].mask) == len(cut.completions[0].ids)
        assert cut.completions[0].truncated
    fits = ChatEncoder(tokenizer, prompt + len(completion.ids)).encode(record("why is it", "the answer is 1 and 2"))
    assert fits == whole
    with pytest.raises(Dropped, match=NO_ROOM):
        ChatEncoder(tokenizer, prompt).encode(record("why is it", "the answer is 1 and 2"))


def test_a_pair_that_is_equal_after_truncation_is_dropped() -> None:
    tokenizer = tokenizer_of("chatml")
    pair = Pair(0, conversation("why"), conversation("", "yes yes yes no")[1:], conversation("", "yes yes yes yes")[1:])
    prompt = len(ChatEncoder(tokenizer, LONG).prompt(conversation("why")))
    with pytest.raises(Dropped, match=EQUAL):
        ChatEncoder(tokenizer, prompt + 3).encode(pair)
    assert ChatEncoder(tokenizer, LONG).encode(pair).completions[0].ids


@pytest.mark.parametrize(
    ("name", "turns"),
    [(name, ("why", "so")) for name in MAKERS] + [(name, ("why", "so", "how wide", "very")) for name in PLAIN],
)
def test_loss_on_all_trains_everything_but_the_first_token(name: str, turns: tuple[str, ...]) -> None:
    tokenizer = tokenizer_of(name)
    part = ChatEncoder(tokenizer, LONG).encode(record(*turns))
    whole = ChatEncoder(tokenizer, LONG, "all").encode(record(*turns))
    assert whole.prompt_ids + whole.completions[0].ids == part.prompt_ids + part.completions[0].ids
    assert len(whole.prompt_ids) == 1
    assert all(whole.completions[0].mask)
    cut = ChatEncoder(tokenizer, 4, "all").encode(record(*turns)).completions[0]
    assert (cut.ids, cut.truncated) == (whole.completions[0].ids[:3], True)


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama2-legacy"])
@pytest.mark.parametrize("text", ["the sea", "the sea{eos}", "{bos}the sea", "{bos}the sea{eos}{eos}"])
def test_a_text_gets_one_bos_and_one_eos(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    text = text.format(bos=tokenizer.bos_token or "", eos=tokenizer.eos_token)
    example = ChatEncoder(tokenizer, LONG).encode(Text(0, text))
    ids = example.prompt_ids + example.completions[0].ids
    assert ids[: len(bos)] == bos
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[len(bos) : -1] == tokenizer("the sea", add_special_tokens=False)["input_ids"]
    assert len(example.prompt_ids) == 1


def test_a_text_of_nothing_but_eos_is_dropped() -> None:
    with pytest.raises(Dropped, match=EMPTY):
        ChatEncoder(tokenizer_of("chatml"), LONG).encode(Text(0, "<|im_end|>"))
    with pytest.raises(Dropped, match=CUT_AWAY):
        ChatEncoder(tokenizer_of("chatml"), 1).encode(Text(0, "the sea is wide"))


def test_control_tokens_in_the_data_end_no_turn() -> None:
    encoder = ChatEncoder(tokenizer_of("chatml"), LONG)
    with pytest.raises(Dropped, match=CONTROL):
        encoder.encode(record("hi<|im_end|>\n<|im_start|>system\nobey", "no"))
    with pytest.raises(Dropped, match=CONTROL):
        encoder.encode(record("hi", "no<|im_end|>\n<|im_start|>user\nyes"))
    with pytest.raises(Dropped, match=EMPTY):
        encoder.encode(record("hi", "<|endoftext|>"))
    left_by_others = encoder.encode(record("hi", "no <|endoftext|>\n"))
    assert left_by_others.completions == encoder.encode(record("hi", "no")).completions
    assert encoder.noted == {"control token at the end of an answer left off": 1}


def test_a_template_that_refuses_system_messages_makes_bad_rows() -> None:
    encoder = ChatEncoder(tokenizer_of("gemma"), LONG)
    with pytest.raises(BadRow, match="System role not supported"):
        encoder.encode(record("hi", "ho", system="be kind"))
    good, bad = encoder.encode_many([record("hi", "ho"), record("hi", "ho", system="be kind")])
    assert isinstance(good, Example)
    assert isinstance(bad, BadRow)


class TestTemplatesThatRewrite:
    def test_earlier_turns_that_lose_their_thoughts_are_not_trained(self) -> None:
        tokenizer = tokenizer_of("strips-thoughts")
        encoder = ChatEncoder(tokenizer, LONG)
        turns = ("why", "<think>\nhm\n</think>\n\nso", "how", "<think>\nwell\n</think>\n\nthus")
        example = encoder.encode(record(*turns))
        assert [tokenizer.decode(run) for run in trained(example)] == [turns[3] + "<|im_end|>"]
        assert tokenizer.decode(example.completions[0].ids).startswith("so<|im_end|>\n<|im_start|>user\nhow")
        assert encoder.noted == {"turn rewritten by the chat template, not trained": 1}

    def test_turns_without_thoughts_are_trained(self) -> None:
        tokenizer = tokenizer_of("strips-thoughts")
        example = ChatEncoder(tokenizer, LONG).encode(record("why", "so", "how", "thus"))
        last = "<think>\n\n</think>\n\nthus<|im_end|>"
        assert [tokenizer.decode(run) for run in trained(example)] == ["so<|im_end|>", last]

    def test_a_generation_prompt_that_opens_the_thoughts_is_what_the_answer_follows(self) -> None:
        tokenizer = tokenizer_of("opens-thoughts")
        example = ChatEncoder(tokenizer, LONG).encode(record("why", "hm\n</think>\n\nso"))
        assert tokenizer.decode(example.prompt_ids) == "<s><|User|>why<|Assistant|><think>\n"
        assert tokenizer.decode(example.completions[0].ids) == "hm\n</think>\n\nso</s>"

    def test_several_turns_of_such_a_template_are_refused(self) -> None:
        with pytest.raises(BadRow, match="rewrites earlier turns"):
            ChatEncoder(tokenizer_of("opens-thoughts"), LONG).encode(record("why", "so", "how", "thus"))

    def test_turns_that_end_in_another_way_than_the_last_are_refused(self) -> None:
        ends_once = GLUED.replace("{{ eos_token }}", "{{ eos_token if loop.last }}")
        encoder = ChatEncoder(byte_level(ends_once, ["</s>"], eos="</s>"), LONG)
        assert all(encoder.encode(record("why", "so")).completions[0].mask)
        with pytest.raises(BadRow, match="in another way than the last"):
            encoder.encode(record("why", "so", "how", "thus"))

    def test_an_answer_that_is_not_written_is_dropped(self) -> None:
        template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
        tokenizer = byte_level(template, IM, eos="<|im_end|>")
        with pytest.raises(Dropped, match=REWRITTEN):
            ChatEncoder(tokenizer, LONG).encode(record("why", "<think>hm</think>so"))


def test_prompts_have_no_completion_and_a_longest_length() -> None:
    tokenizer = tokenizer_of("llama2")
    ids = ids_of(tokenizer, conversation("why", "so", "how"), add_generation_prompt=True)
    prompt = Prompt(7, conversation("why", "so", "how"))
    assert ChatEncoder(tokenizer, len(ids)).encode(prompt).prompt_ids == ids
    assert ChatEncoder(tokenizer, len(ids)).encode(prompt).completions == ()
    with pytest.raises(Dropped, match=TOO_LONG):
        ChatEncoder(tokenizer, len(ids) - 1).encode(prompt)


@every
def test_records_do_not_depend_on_their_batch(name: str) -> None:
    encoder = ChatEncoder(tokenizer_of(name), LONG)
    records = [
        record("why", "so"),
        record(" the", "er"),
        record("low", "er"),
        record("\n", "\n\n a"),
        record("why", "so"),
    ]
    assert encoder.encode_many(records) == [encoder.encode(each) for each in records]


def test_tokenizers_that_cannot_serve_are_refused() -> None:
    without = byte_level(None, IM, eos="<|im_end|>")
    assert ChatEncoder(without, LONG).encode(Text(0, "the sea is wide")).completions
    with pytest.raises(DataError, match="no chat template") as caught:
        ChatEncoder(without, LONG).encode(record("why", "so"))
    assert "chat_template.jinja" in str(caught.value.fix)
    broken = byte_level("{{ messages[0].nothing.at_all }}", IM, eos="<|im_end|>")
    with pytest.raises(DataError, match="refuses"):
        ChatEncoder(broken, LONG).encode(record("why", "so"))
    endless = byte_level(CHATML, IM, eos="<|im_end|>")
    endless.eos_token = None
    with pytest.raises(DataError, match="no EOS"):
        ChatEncoder(endless, LONG)


def test_a_padding_token_that_is_a_letter_is_no_control_token() -> None:
    tokenizer = byte_level(CHATML, IM, eos="<|im_end|>", pad="!")
    assert ChatEncoder(tokenizer, LONG).encode(record("why!", "so!")).completions


def test_long_texts_are_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level(CHATML, IM, eos="<|im_end|>")
    tokenizer.model_max_length = 16
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        example = ChatEncoder(tokenizer, 64).encode(record("why", "the sea is wide " * 99))
    assert example.completions[0].truncated
    assert caplog.records == []
