from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from align.errors import LaunchError, RecipeError
from align.models import load_tokenizer, train_tokenizer
from align.models.tokenizer import end_ids
from align.spec.model import TokenizerSettings

TEXTS = ["A quiet film, quietly made.", "Déjà vu! 12345 日本\n\n  twice"] * 30
TURNS = [{"role": "user", "content": "Say film."}, {"role": "assistant", "content": "A quiet film."}]


def test_training_is_reproducible_and_loses_nothing() -> None:
    one, two = (train_tokenizer(TEXTS, TokenizerSettings(vocab_size=300)) for _ in range(2))
    assert one.get_vocab() == two.get_vocab()
    assert 280 < len(one) <= 300, "as many as the text has merges for"
    for text in [*TEXTS, " unseen Ω text\twith  spaces "]:
        ids = one(text)["input_ids"]
        assert one.decode(ids) == text, "nothing is added and nothing lost"


def test_special_tokens_are_distinct_single_tokens() -> None:
    tokenizer = train_tokenizer(TEXTS, TokenizerSettings(vocab_size=300))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|im_end|>")
    assert (tokenizer.bos_token, tokenizer.unk_token) == (None, None)
    ids = tokenizer("<|im_start|><|im_end|><|pad|>")["input_ids"]
    assert len(ids) == len(set(ids)) == 3


def test_template_marks_the_assistants_turn_with_its_end(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, TokenizerSettings(vocab_size=300)).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    encoded = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(trained) == "A quiet film.<|im_end|>"
    prompt = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded["input_ids"][: len(prompt)] == prompt, "a prompt is a prefix of its conversation"
    assert tokenizer.padding_side == "left"


def made(folder: Path, **changes) -> Path:
    tokenizer = GPT2Tokenizer(
        **{"eos_token": "<|endoftext|>", "bos_token": None, "unk_token": None, "pad_token": None} | changes
    ).train_new_from_iterator(TEXTS, vocab_size=300, show_progress=False)
    tokenizer.chat_template = changes.get("chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer.save_pretrained(folder)
    return folder


def test_a_missing_pad_token_is_taken_from_the_vocabulary(tmp_path: Path) -> None:
    plain = load_tokenizer(made(tmp_path / "a"))
    assert plain.pad_token == "<|endoftext|>", "nothing better"
    better = load_tokenizer(made(tmp_path / "b", extra_special_tokens=["<|pad|>"]))
    assert better.pad_token == "<|pad|>"
    assert len(better) == len(AutoTokenizer.from_pretrained(tmp_path / "b")), "no embedding has to be added"


def test_missing_parts_are_told(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match="no tokenizer can be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(LaunchError, match="no tokenizer 'nobody/nothing'"):
        load_tokenizer("nobody/nothing")
    folder = made(tmp_path / "bare", chat_template=None)
    with pytest.raises(RecipeError, match="no chat template"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, chat_template=False).chat_template is None


def test_completions_end_where_the_template_ends_a_turn(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert end_ids(tokenizer) == {tokenizer.eos_token_id}
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    marks = ["<|im_start|>", "<|im_end|>"]
    other = load_tokenizer(made(tmp_path, extra_special_tokens=marks, chat_template=template))
    assert other.eos_token == "<|endoftext|>"
    assert end_ids(other) == {other.eos_token_id, other.convert_tokens_to_ids("<|im_end|>")}
