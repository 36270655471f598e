"""Published data sets, read whole: their known warts are found and counted, none is passed on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.data import load_examples, load_prompts
from align.data.reading import Reading
from align.data.records import Conversation, Pair, Unpaired
from align.spec.data import Conversion, FileData, records_of
from align.types import Batch
from tests.data.tokenizers import tokenizer_of

NO_INPUT = "input that says there is none"
EMPTY = "candidate left off: empty completion"
REPEATED = "candidate left off: said by an earlier one"
JUDGED_TWICE = "answer with several scores has their mean"
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
    "math/gsm8k_train.jsonl": ("prompt_completion", QA, 7_473, {}, {}),
    "multitask/t0_templates/ag_news_classify.jsonl": ("prompt_completion", {}, 200, {}, {}),
    "multitask/korsts_dev.tsv": ("text", {"text": "sentence1"}, 1_500, {"duplicate": 32}, {}),
    "eval/bbh/sports_understanding.json": ("prompt_completion", BBH, 250, {"duplicate": 2}, {}),
    "eval/alpaca_eval_text_davinci_003_outputs.json": ("alpaca", {}, 805, {"empty completion": 2}, {}),
    "eval/ifeval_input_data.jsonl": ("prompts", {}, 541, {}, {}),
    "pairs/kto_en_demo.json": ("unpaired", {}, 300, {}, {}),
    "pairs/alpaca_eval_annotations_alpaca-7b.json": ("labelled_pairs", {}, 805, {"tie": 16}, {}),
    "pairs/pandalm_testset-v1.json": (
        "labelled_pairs",
        {},
        999,
        {"duplicate": 76, "empty completion": 52, "tie": 105},
        {},
    ),
    "pairs/llmbar_adversarial_gptinst.json": ("labelled_pairs", {}, 92, {}, {}),
    "pairs/llmbar_adversarial_gptout.json": ("labelled_pairs", {}, 47, {}, {}),
    "pairs/llmbar_adversarial_manual.json": ("labelled_pairs", {}, 46, {}, {}),
    "pairs/llmbar_adversarial_neighbor.json": ("labelled_pairs", {}, 134, {}, {}),
    "pairs/llmbar_mtbench_human_200.json": ("labelled_pairs", {}, 200, {"duplicate": 5}, {}),
    "pairs/llmbar_natural.json": ("labelled_pairs", {}, 100, {}, {}),
    "ranked/alpaca_eval_ranked_k8.jsonl": (
        "ranked",
        {"responses": "candidates", "score": "gpt4_turbo_weighted_score"},
        805,
        {},
        {EMPTY: 4, REPEATED: 77},
    ),
    "ranked/ko_rm_judge_ranked_k5.jsonl": ("ranked", {}, 450, {}, {EMPTY: 4, REPEATED: 3}),
    "ranked/oaast_rm_zh.json": (
        "ranked",
        {},
        775,
        {"fewer than two candidates": 3},
        {"list without scores read as best first": 775, REPEATED: 3, JUDGED_TWICE: 3},
    ),
    "ranked/mtbench_gpt4_single_ranked_k5.jsonl": (
        "mt_bench",
        {},
        80,
        {"all candidates tied": 3},
        {EMPTY: 1, REPEATED: 10, JUDGED_TWICE: 3},
    ),
}

QUARANTINED = {
    "pairs/pandalm_testset-v1.json": {
        f"`response{k}` is true or false, not text or a list of messages": count for k, count in ((1, 4), (2, 2))
    }
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
    quarantined = QUARANTINED.get(name, {})
    assert (reading.rows_read, dict(reading.quarantined)) == (rows, quarantined)
    assert (dict(reading.dropped), dict(reading.noted)) == (dropped, noted)
    assert len(records) == rows - sum(dropped.values()) - sum(quarantined.values())


def test_every_judged_file_is_read(align_data: Path) -> None:
    names = {f"{part}/{path.name}" for part in ("pairs", "ranked") for path in (align_data / part).iterdir()}
    assert names == {name for name in FILES if name.startswith(("pairs/", "ranked/"))}


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


def raw(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def test_votes_of_three_annotators(align_data: Path) -> None:
    name = "pairs/pandalm_testset-v1.json"
    records, _ = read(align_data, name)
    given = raw(align_data, name)
    for record in records:
        row = given[record.row]
        votes = [row[f"annotator{k}"] for k in (1, 2, 3)]
        better = 1 if record.chosen[0]["content"] == row["response1"] else 2
        assert votes.count(better) >= 2
    assert len(records) == 760
    assert len({record.prompt[0]["content"] for record in records}) == 153


def test_candidates_are_ordered_as_they_were_judged(align_data: Path) -> None:
    sizes = {}
    for name, field, key in (
        ("ranked/alpaca_eval_ranked_k8.jsonl", "candidates", "gpt4_turbo_weighted_score"),
        ("ranked/ko_rm_judge_ranked_k5.jsonl", "responses", "score"),
    ):
        records, _ = read(align_data, name)
        for record, row in zip(records, raw(align_data, name), strict=True):
            said = {each.get("output", each.get("response")): each[key] for each in reversed(row[field])}
            assert [said[response[0]["content"]] for response in record.responses] == record.scores
        sizes[name] = Counter(len(record.responses) for record in records)
    assert list(sizes.values()) == [{8: 757, 7: 30, 6: 9, 5: 5, 4: 2, 3: 2}, {5: 444, 4: 5, 3: 1}]


def test_order_is_the_score_of_a_list_without_scores(align_data: Path) -> None:
    records, _ = read(align_data, "ranked/oaast_rm_zh.json")
    assert all(record.scores == sorted(record.scores, reverse=True) for record in records)
    assert sum(len(record.responses) for record in records) == 1984
    assert sum(len(record.prompt) > 1 for record in records) == 390


def test_both_turns_of_mt_bench_are_judged_by_their_mean(align_data: Path) -> None:
    records, _ = read(align_data, "ranked/mtbench_gpt4_single_ranked_k5.jsonl")
    assert {len(response) for record in records for response in record.responses} == {3}
    scores = Counter(score for record in records for score in record.scores)
    assert (min(scores), max(scores)) == (1.0, 10.0)
    assert sum(len(record.responses) for record in records) == 374


def test_labels_judge_the_last_answer(align_data: Path) -> None:
    records, _ = read(align_data, "pairs/kto_en_demo.json")
    labelled = [record for record in records if isinstance(record, Unpaired)]
    assert Counter(record.label for record in labelled) == {True: 150, False: 150}
    assert {len(record.completion) for record in labelled} == {1}
    assert sum(len(record.prompt) > 1 for record in labelled) == 77


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


BATCHES = {
    "conversation": Batch.TOKENS,
    "pair": Batch.PAIRED,
    "ranked": Batch.RANKED,
    "unpaired": Batch.UNPAIRED,
}


@pytest.mark.parametrize(
    ("name", "how", "limit", "counts"),
    [
        # records beyond one of each row, examples, candidates, desirable
        ("pairs/kto_en_demo.json", None, None, (0, 300, 0, 150)),
        ("pairs/dpo_en_demo.json", "unpaired", None, (300, 590, 0, 295)),
        ("pairs/pandalm_testset-v1.json", None, None, (0, 760, 1520, 0)),
        ("ranked/ko_rm_judge_ranked_k5.jsonl", None, None, (0, 450, 2243, 0)),
        ("ranked/ko_rm_judge_ranked_k5.jsonl", "all_pairs", 100, (900, 1000, 2000, 0)),
        ("ranked/ko_rm_judge_ranked_k5.jsonl", "adjacent_pairs", 100, (300, 400, 800, 0)),
        ("ranked/ko_rm_judge_ranked_k5.jsonl", "best", None, (0, 450, 0, 0)),
        ("ranked/oaast_rm_zh.json", None, None, (0, 772, 1984, 0)),
        ("ranked/mtbench_gpt4_single_ranked_k5.jsonl", None, None, (0, 77, 374, 0)),
        ("ranked/alpaca_eval_ranked_k8.jsonl", "best_worst", None, (0, 805, 1610, 0)),
        ("ranked/alpaca_eval_ranked_k8.jsonl", None, 200, (0, 200, 1582, 0)),
    ],
)
def test_examples_of_judged_rows(
    align_data: Path, name: str, how: Conversion | None, limit: int | None, counts: tuple[int, ...]
) -> None:
    format, columns, *_ = FILES[name]
    source = FileData(path=name, format=format, columns=columns, convert=how, limit=limit)
    batch, tokenizer = BATCHES[records_of(source)], tokenizer_of("chatml")
    examples, report = load_examples(source, batch=batch, tokenizer=tokenizer, max_tokens=16_384, folder=align_data)
    assert (report.converted, report.examples, report.candidates, report.desirable) == counts
    left_out = sum(report.dropped.values()) + sum(report.quarantined.values())
    assert report.rows_read + report.converted == report.examples + left_out
    assert report.truncated == 0
    for example in examples:
        own = example.completions[: max(1, len(example.scores))]
        assert len({tuple(completion.ids) for completion in own}) == len(own)
        assert all(any(completion.mask) for completion in example.completions)
        assert len(example.completions) == len(own) + (batch is Batch.UNPAIRED)
        assert len(example.scores) == 1 or len(set(example.scores)) != 1


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
