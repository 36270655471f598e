"""Tokenizers: load one with a chat template and a pad token, or train a small one on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from align.errors import RecipeError
from align.models.source import reading
from align.spec.model import TokenizerSettings

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, with the assistant's turns marked as what is trained."""

PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
"""Tokens a vocabulary may have that are fit to pad with, best first."""


def load_tokenizer(
    source: str | Path, revision: str | None = None, *, chat_template: bool = True
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads on the left and has a pad token.

    A missing pad token is chosen from the vocabulary, so that no embedding has to be resized; if nothing fits, padding
    is done with EOS. Nothing in align tells padding by its id, so a real EOS is trained and read all the same.

    Args:
        source: Folder or Hub name.
        revision: Hub revision.
        chat_template: Whether a chat template is required.

    Raises:
        RecipeError: If the source holds no tokenizer, or no chat template or EOS where one is needed.
        LaunchError: If the Hub cannot be reached.
    """
    with reading(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision)
    if tokenizer.eos_token is None:
        raise RecipeError(
            f"the tokenizer of {source} has no EOS token, so no completion could ever end",
            where="model.base",
            fix="set eos_token in its tokenizer_config.json",
        )
    if chat_template and not tokenizer.chat_template:
        raise RecipeError(
            f"the tokenizer of {source} has no chat template",
            where="model.base",
            fix="use the instruction-tuned variant, or put a chat_template.jinja beside the tokenizer",
        )
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in PAD_TOKENS if token in vocabulary), tokenizer.eos_token)
    tokenizer.padding_side = "left"
    return tokenizer


def train_tokenizer(texts: Iterable[str], settings: TokenizerSettings) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer with ChatML markers. EOS is `<|im_end|>`; there is no BOS and no unknown token.

    Args:
        texts: What to learn merges from. Little text gives fewer tokens than `vocab_size`.
        settings: Reads `vocab_size`.
    """
    special = {"pad_token": "<|pad|>", "eos_token": "<|im_end|>", "bos_token": None, "unk_token": None}
    empty = GPT2Tokenizer(**special, extra_special_tokens=["<|im_start|>"], padding_side="left")
    tokenizer = empty.train_new_from_iterator(texts, vocab_size=settings.vocab_size, show_progress=False)
    tokenizer.chat_template = CHATML
    return tokenizer


def end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a completion: EOS, and what the chat template puts after an assistant's turn.

    The two differ for many base models: EOS is `<|endoftext|>` there while turns, and so trained completions, end with
    `<|im_end|>`.
    """
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2]
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        added = tokenizer.added_tokens_decoder
        if ids and ids[0] in added and added[ids[0]].special:
            ends.add(ids[0])
    return ends
