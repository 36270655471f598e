"""Published data sets, read whole: their known warts are found and counted, none is passed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.data import load_examples, load_prompts
from align.data.reading import Reading
from align.data.records import Conversation, Pair
from align.spec.data import FileData
from align.types import Batch
from tests.data.tokenizers import tokenizer_of

NO_INPUT = "input that says there is none"
QA = {"prompt": "question", "completion": "answer"}
BBH = {"prompt": "input", "completion": "target"}

FILES: dict[str, tuple[str, dict[str, str], int, dict[str, int], dict[str, int]]] = {
    # file: format, columns, rows, dropped, noted
    "sft/alpaca_data.json": ("alpaca", {}, 52_002, {"empty completion": 28}, {NO_INPUT: 671}),
    "sft/ko_alpaca_data.json": ("alpaca", {}, 11_432, {"empty completion": 1}, {NO_INPUT: 143}),
    "sft/lima.json": ("alpaca", {}, 1_029, {}, {}),
    "sft/self_instruct_user_oriented_252.jsonl": ("prompts", {}, 252, {"duplicate": 1}, {}),
    "pairs/dpo_en_demo.json": ("pairs", {}, 300, {"duplicate": 5}, {}),
    "pairs/dpo_zh_demo.json": ("pairs", {}, 300, {"duplicate": 11}, {}),
    "pairs/comparison_gpt4_data_en.json": ("pairs", {}, 1_095, {}, {NO_INPUT: 15}),
    "pairs/kto_en_demo.json": ("messages", {}, 300, {}, {}),
    "math/gsm8k_train.jsonl": ("prompt_completion", QA, 7_473, {}, {}),
    "multitask/t0_templates/ag_news_classify.jsonl": ("prompt_completion", {}, 200, {}, {}),
    "multitask/korsts_dev.tsv": ("text", {"text": "sentence1"}, 1_500, {"duplicate": 32}, {}),
    "eval/bbh/sports_understanding.json": ("prompt_completion", BBH, 250, {"duplicate": 2}, {}),
    "eval/alpaca_eval_text_davinci_003_outputs.json": ("alpaca", {}, 805, {"empty completion": 2}, {}),
    "eval/ifeval_input_data.jsonl": ("prompts", {}, 541, {}, {}),
    "ranked/ko_rm_judge_ranked_k5.jsonl": ("prompts", {}, 450, {}, {}),
}


def read(folder: Path, name: str) -> tuple[list[Any], Reading]:
    format, columns, *_ = FILES[name]
    reading = Reading(FileData(path=name, format=format, columns=columns), folder)
    return [record for record, _ in reading.records()], reading


@pytest.mark.parametrize("name", FILES)
def test_every_row_of_a_file_is_accounted_for(align_data: Path, name: str) -> None:
    _, _, rows, dropped, noted = FILES[name]
    records, reading = read(align_data, name)
    reading.finish(None, left=len(records))
    assert (reading.rows_read, dict(reading.quarantined)) == (rows, {})
    assert (dict(reading.dropped), dict(reading.noted)) == (dropped, noted)
    assert len(records) == rows - sum(dropped.values())


def test_lima_keeps_its_history(align_data: Path) -> None:
    records, _ = read(align_data, "sft/lima.json")
    lengths = [len(record.messages) for record in records if isinstance(record, Conversation)]
    assert sum(length > 2 for length in lengths) == 29
    assert all(length % 2 == 0 for length in lengths)


def test_pairs_with_history_and_system(align_data: Path) -> None:
    records, _ = read(align_data, "pairs/dpo_en_demo.json")
    pairs = [record for record in records if isinstance(record, Pair)]
    assert len(pairs) == 295
    assert sum(pair.prompt[0]["role"] == "system" for pair in pairs) == 80
    assert sum(len(pair.prompt) >= 3 for pair in pairs) == 103
    assert {len(pair.chosen) for pair in pairs} == {1}


@pytest.mark.parametrize(
    ("name", "batch", "limit"),
    [
        ("sft/alpaca_data.json", Batch.TOKENS, 500),
        ("sft/ko_alpaca_data.json", Batch.TOKENS, 100),
        ("sft/lima.json", Batch.TOKENS, None),
        ("pairs/dpo_en_demo.json", Batch.PAIRED, None),
        ("pairs/dpo_zh_demo.json", Batch.PAIRED, None),
        ("pairs/comparison_gpt4_data_en.json", Batch.PAIRED, 300),
        ("multitask/t0_templates/ag_news_classify.jsonl", Batch.TOKENS, None),
    ],
)
@pytest.mark.parametrize("tokenizer_name", ["chatml", "llama2"])
def test_examples_of_real_rows(
    align_data: Path, name: str, batch: Batch, limit: int | None, tokenizer_name: str
) -> None:
    tokenizer = tokenizer_of(tokenizer_name)
    format, columns, *_ = FILES[name]
    source = FileData(path=name, format=format, columns=columns, limit=limit)
    examples, report = load_examples(source, batch=batch, tokenizer=tokenizer, max_tokens=512, folder=align_data)
    assert report.rows_read == report.examples + sum(report.dropped.values())
    for example in examples:
        for completion in example.completions:
            ends = completion.ids[-1] == tokenizer.eos_token_id
            assert ends != completion.truncated
            assert len(example.prompt_ids) + len(completion.ids) <= 512
            assert any(completion.mask)
        assert len({tuple(completion.ids) for completion in example.completions}) == (2 if batch is Batch.PAIRED else 1)


def test_end_markers_of_another_model_are_left_off(align_data: Path) -> None:
    source = FileData(path="multitask/t0_templates/ag_news_classify.jsonl", format="prompt_completion")
    tokenizer = tokenizer_of("chatml")  # it knows <|endoftext|>, with which these completions end
    examples, report = load_examples(
        source, batch=Batch.TOKENS, tokenizer=tokenizer, max_tokens=4096, folder=align_data
    )
    assert report.noted == {"control token at the end of an answer left off": 200}
    assert report.examples == 200
    assert not any(tokenizer.convert_tokens_to_ids("<|endoftext|>") in e.completions[0].ids for e in examples)


def test_prompts_of_pairs_end_with_the_question(align_data: Path) -> None:
    source = FileData(path="pairs/dpo_en_demo.json", format="pairs")
    prompts, report = load_prompts(source, tokenizer=tokenizer_of("chatml"), max_tokens=10**6, folder=align_data)
    pairs, _ = read(align_data, "pairs/dpo_en_demo.json")
    asked = {record.row: record.prompt[-1]["content"] for record in pairs}
    assert report.examples == len(prompts)
    assert report.dropped == {"duplicate": 5}
    for prompt in prompts:
        assert prompt.text == asked[prompt.row]
