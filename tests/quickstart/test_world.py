"""The world's tables: reproducible, disjoint, ordered by quality, and strict about options."""

import hashlib
import json
from itertools import combinations as pairs_of
from itertools import islice, pairwise
from statistics import mean

import pytest

from align.errors import RecipeError
from align.quickstart.gold import GoldReward
from align.quickstart.prompts import parse
from align.quickstart.world import MAX_HELDOUT, SMALLEST_GAP, FilmReviews, noise_width

WORLD = FilmReviews()
COLUMNS = {
    "prompt_completion": ["prompt", "completion"],
    "pairs": ["prompt", "chosen", "rejected"],
    "ranked": ["prompt", "responses", "scores"],
    "prompts": ["prompt"],
}
DIGESTS = {
    "corpus": (2, "b5fc636733d49ae6"),
    "demonstrations": (2, "4f97a751940cd9cd"),
    "preferences": (2, "6a3001d7567738af"),
    "ranked": (2, "b7a147f91d68aa59"),
    "heldout": (2, "3a69c380f208eec4"),
}
score = GoldReward().score


def table(part, rows=400, seed=0, **options):
    return list(WORLD.generate(part, rows, seed, options))


def combinations(rows):
    tasks = (parse(row["prompt"]) for row in rows)
    return {(task.title, task.tone, frozenset(task.features)) for task in tasks}


def gap(row):
    return score(row["prompt"], row["chosen"]) - score(row["prompt"], row["rejected"])


@pytest.mark.parametrize("part", WORLD.parts)
def test_a_part_is_a_function_of_its_seed(part):
    rows = table(part, rows=50)
    assert rows == table(part, rows=50)
    assert rows != table(part, rows=50, seed=1)
    assert rows[:20] == table(part, rows=20)
    assert [list(row) for row in rows] == [COLUMNS[WORLD.parts[part]]] * 50


@pytest.mark.parametrize("part", WORLD.parts)
def test_output_is_that_of_the_declared_version(part):
    """A change of output must bump `FilmReviews.version` (stored stages hang on it) and renew these digests."""
    digest = hashlib.sha256(json.dumps(table(part, rows=20)).encode()).hexdigest()[:16]
    assert (WORLD.version, digest) == DIGESTS[part]


def test_parts_share_no_random_stream():
    prompts = {part: [row["prompt"] for row in table(part, rows=50)] for part in WORLD.parts}
    assert not any(len(set(prompts[a]) & set(prompts[b])) > 5 for a in prompts for b in prompts if a < b)


def test_heldout_combinations_appear_in_no_training_part_whatever_the_seed():
    heldout = combinations(table("heldout", rows=MAX_HELDOUT)) | combinations(table("heldout", rows=400, seed=7))
    for part in ("corpus", "demonstrations", "preferences", "ranked"):
        for seed in (0, 7, 8):
            assert heldout.isdisjoint(combinations(table(part, rows=2000, seed=seed)))


def test_heldout_prompts_never_repeat_a_combination():
    assert len(combinations(table("heldout", rows=MAX_HELDOUT))) == MAX_HELDOUT


def test_gold_rises_from_corpus_to_demonstrations_to_chosen():
    pairs = table("preferences", rows=1000, label_noise=0.0)
    means = [
        mean(score(row["prompt"], row["completion"]) for row in table("corpus", rows=1000)),
        mean(score(row["prompt"], row["completion"]) for row in table("demonstrations", rows=1000)),
        mean(score(row["prompt"], row["chosen"]) for row in pairs),
    ]
    assert all(higher - lower > 0.1 for lower, higher in pairwise(means)), means
    assert means[0] > 0.1
    assert means[-1] < 0.9


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_labels_are_flipped_at_the_rate_asked_for(noise):
    flips = mean(gap(row) < 0 for row in table("preferences", rows=2000, label_noise=noise))
    assert flips == pytest.approx(noise, abs=0.03 if noise else 0.0)


def test_no_pair_is_a_tie():
    assert all(abs(gap(row)) >= SMALLEST_GAP for row in table("preferences", rows=1000))


def test_shuffled_labels_carry_no_signal():
    gaps = [gap(row) for row in table("preferences", rows=2000, shuffle_labels=True)]
    assert mean(value > 0 for value in gaps) == pytest.approx(0.5, abs=0.04)
    assert mean(gaps) == pytest.approx(0.0, abs=0.03)


def test_labelling_leaves_the_texts_alone():
    texts = [
        [(row["prompt"], {row["chosen"], row["rejected"]}) for row in table("preferences", rows=100, **options)]
        for options in ({}, {"label_noise": 0.4}, {"shuffle_labels": True})
    ]
    assert texts[0] == texts[1] == texts[2]


def golds(row):
    return [score(row["prompt"], response) for response in row["responses"]]


def swaps(rows):
    """Whether each two candidates of a row are in the wrong order."""
    for row in rows:
        gold, scores = golds(row), row["scores"]
        yield from ((gold[a] - gold[b]) * (scores[a] - scores[b]) < 0 for a, b in pairs_of(range(len(gold)), 2))


@pytest.mark.parametrize("candidates", [2, 4, 7])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_scores_order_candidates_wrongly_at_the_rate_asked_for(candidates, noise):
    rows = table("ranked", rows=500, candidates=candidates, label_noise=noise)
    assert all(len(row["responses"]) == len(row["scores"]) == len(set(row["responses"])) == candidates for row in rows)
    assert mean(swaps(rows)) == pytest.approx(noise, abs=0.04 if noise else 0.0)


def test_scores_without_noise_are_gold_rewards():
    for row in table("ranked", rows=100, label_noise=0.0):
        assert row["scores"] == [round(gold, 4) for gold in golds(row)]
        assert all(abs(a - b) >= SMALLEST_GAP for a, b in pairs_of(golds(row), 2))


def test_near_candidates_change_places_more_often_than_far_ones():
    near, far = [], []
    for row in table("ranked", rows=1000, label_noise=0.2):
        gold, scores = golds(row), row["scores"]
        for a, b in pairs_of(range(4), 2):
            (near if abs(gold[a] - gold[b]) < 0.2 else far).append((gold[a] - gold[b]) * (scores[a] - scores[b]) < 0)
    assert mean(near) > 2 * mean(far)


def test_shuffled_scores_are_the_same_numbers_and_carry_no_signal():
    rows = table("ranked", rows=500, shuffle_labels=True)
    assert mean(swaps(rows)) == pytest.approx(0.5, abs=0.04)
    assert all(sorted(row["scores"]) == sorted(round(gold, 4) for gold in golds(row)) for row in rows)


def test_scoring_leaves_the_texts_alone_and_more_candidates_come_behind():
    four = table("ranked", rows=50)
    for options in ({"label_noise": 0.4}, {"shuffle_labels": True}):
        assert [row["responses"] for row in table("ranked", rows=50, **options)] == [row["responses"] for row in four]
    six = table("ranked", rows=50, candidates=6)
    assert [row["responses"][:4] for row in six] == [row["responses"] for row in four]


def test_noise_is_as_wide_as_its_share_needs():
    assert noise_width([0.1, 0.5], 0.0) == 0.0
    # (1 - 0.4 / 2w)^2 / 2 = 0.125 where w = 0.4
    assert noise_width([0.1, 0.5], 0.125) == pytest.approx(0.4)
    assert noise_width([0.0, 0.1, 0.9], 0.2) < noise_width([0.0, 0.1, 0.9], 0.3)


def test_longer_is_not_better():
    """Length must not be the shortcut by which a method learns the labels."""
    longer = mean(len(row["chosen"]) > len(row["rejected"]) for row in table("preferences", rows=2000, label_noise=0.0))
    assert 0.35 < longer < 0.65


@pytest.mark.parametrize(
    ("part", "rows", "options", "message"),
    [
        ("novels", 1, {}, "no part 'novels'"),
        ("corpus", 0, {}, "rows is 0"),
        ("corpus", 1, {"label_noise": 0.1}, "ignores label_noise"),
        ("heldout", 1, {"shuffle_labels": True}, "ignores shuffle_labels"),
        ("heldout", MAX_HELDOUT + 1, {}, "held-out prompts asked for"),
        ("preferences", 1, {"candidates": 3}, "ignores candidates"),
        ("preferences", 1, {"noise": 0.1}, "option noise"),
        ("ranked", 1, {"candidates": 1}, "option candidates = 1"),
        ("ranked", 1, {"candidates": 9}, "option candidates = 9"),
        ("ranked", 1, {"label_noise": 0.2, "shuffle_labels": True}, "no effect"),
        ("preferences", 1, {"label_noise": 0.5}, "option label_noise = 0.5"),
        ("preferences", 1, {"label_noise": 0.2, "shuffle_labels": True}, "no effect"),
    ],
)
def test_a_wrong_request_is_refused_before_the_first_row(part, rows, options, message):
    with pytest.raises(RecipeError, match=message) as caught:
        WORLD.generate(part, rows, 0, options)
    assert caught.value.fix


def test_rows_come_lazily():
    assert len(list(islice(WORLD.generate("corpus", 10**9, 0, {}), 3))) == 3
