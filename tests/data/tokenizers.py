"""Small tokenizers of the families found in the wild, trained on the spot, each with the chat template of its kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "user assistant system question answer yes no hello world the film was wonderful and the acting was dull",
    "Below is a question. Write an answer: 1, 2, 3.\n\nWhat is the sea?\n\n\nThe sea is wide.",
    "안녕하세요 세계 바다는 넓습니다 请提供一下分析 银行业 naïve café 😊 e\u0301",
    "User: what is it?\nAssistant: it is  a   test\n\tof tabs [INST] [/INST] <|user|> <|assistant|>",
]

QWEN_SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKS_WITH_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKS_CONTENT = CHATML_MARKS_WITH_END.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
)
CHATML_MARKS_LINE = CHATML_MARKS_WITH_END.replace(
    "'<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "'<|im_end|>\n' }}{% endgeneration %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NO_EOS = (
    "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
GLUED = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Qwen3's way: thoughts stay in the last answer (an empty block is made up where there are none) and leave earlier ones.
STRIPS_THOUGHTS = (
    "{% for m in messages %}{% set content = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% if not loop.last %}{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% elif '</think>' not in content %}{% set content = '<think>\n\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# R1's way: the generation prompt opens the thoughts, and finished turns lose them.
OPENS_THOUGHTS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '<|User|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)


def byte_level(template: str | None, special: list[str], *, eos: str, bos: str | None = None, pad: str | None = None):
    """Byte-level BPE, as of GPT-2, Qwen and Llama 3; BOS is put before a text by a post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(QWEN_SPLIT, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=500,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special,
            show_progress=False,
        ),
    )
    return wrap(tokenizer, template, eos=eos, bos=bos, pad=pad)


def sentencepiece(template: str, *, legacy: bool, merges_lines: bool = False):
    """BPE with a prefix space and bytes for what is unknown, as of Llama 2 and Mistral.

    Args:
        template: The chat template.
        legacy: Whether every stretch between special tokens gets a prefix space, not the first alone.
        merges_lines: Whether a line break can merge with what follows, as it never does in the real ones.
    """
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    metaspace = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = metaspace
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = [word for text in TEXTS for word in (text.split(" ") if merges_lines else text.split())]
    tokenizer.train_from_iterator(
        words * 3, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return wrap(Tokenizer.from_str(json.dumps(state)), template, eos="</s>", bos="<s>")


def wrap(tokenizer, template, *, eos, bos=None, pad=None):
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    named = {"eos_token": eos, "bos_token": bos, "pad_token": pad or eos}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in named.items() if v})
    wrapped.chat_template = template
    return wrapped


IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": lambda: byte_level(CHATML, IM, eos="<|im_end|>", pad="<|endoftext|>"),
    "chatml-marks-end": lambda: byte_level(CHATML_MARKS_WITH_END, IM, eos="<|im_end|>"),
    "chatml-marks-content": lambda: byte_level(CHATML_MARKS_CONTENT, IM, eos="<|im_end|>"),
    "chatml-marks-line": lambda: byte_level(CHATML_MARKS_LINE, IM, eos="<|im_end|>"),
    "chatml-of-a-base": lambda: byte_level(CHATML, IM, eos="<|endoftext|>"),
    "llama2": lambda: sentencepiece(LLAMA2, legacy=False),
    "llama2-legacy": lambda: sentencepiece(LLAMA2, legacy=True),
    "zephyr": lambda: sentencepiece(ZEPHYR, legacy=False),
    "zephyr-legacy": lambda: sentencepiece(ZEPHYR, legacy=True),
    "zephyr-merging": lambda: sentencepiece(ZEPHYR, legacy=True, merges_lines=True),
    "llama3": lambda: byte_level(
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "gemma": lambda: byte_level(
        GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], eos="<eos>", bos="<bos>", pad="<eos>"
    ),
    "no-eos": lambda: byte_level(NO_EOS, ["</s>"], eos="</s>"),
    "glued": lambda: byte_level(GLUED, ["</s>"], eos="</s>"),
    "strips-thoughts": lambda: byte_level(STRIPS_THOUGHTS, IM, eos="<|im_end|>"),
    "opens-thoughts": lambda: byte_level(
        OPENS_THOUGHTS, ["<s>", "</s>", "<|User|>", "<|Assistant|>"], eos="</s>", bos="<s>"
    ),
}

MARKED = tuple(name for name in MAKERS if "marks" in name)
PLAIN = tuple(name for name in MAKERS if name not in ("strips-thoughts", "opens-thoughts"))
"""Templates that write a conversation as a continuation of its beginning."""


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return MAKERS[name]()
