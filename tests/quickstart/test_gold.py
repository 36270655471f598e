"""The gold reward: its formula on worked examples, and what does not fool it."""

import pytest

from align.errors import DataError
from align.quickstart.gold import GoldReward, judge
from align.quickstart.lexicon import FEATURES, TITLES
from align.quickstart.prompts import Task, parse

PROMPT = "Write a positive review of The Silent Harbor. Mention the acting and the music."
PERFECT = (
    "The Silent Harbor is a superb film. The acting is brilliant. Its music felt truly charming. "
    "I recommend it to everyone."
)
ONE_ONLY = "The Silent Harbor is a superb film. The acting is brilliant. I recommend it to everyone."
CONTRADICTED = PERFECT.replace("charming", "boring")
STRAY = (
    "The Silent Harbor is a superb film. The acting is brilliant. Its music felt truly charming. The plot is lovely."
)
SHORT = "The Silent Harbor is so great. I loved the acting and the music."


@pytest.mark.parametrize(
    ("review", "coverage", "tone", "title", "length", "form"),
    [
        (PERFECT, 1.0, 1.0, 1.0, 1.0, 1.0),
        (ONE_ONLY, 0.5, 1.0, 1.0, 1.0, 1.0),
        (CONTRADICTED, 0.5, 0.5, 1.0, 1.0, 1.0),
        (STRAY, 0.75, 1.0, 1.0, 1.0, 1.0),
        (SHORT, 1.0, 1.0, 1.0, 13 / 16, 1.0),
        (PERFECT.replace("Silent Harbor", "Silent Tower"), 1.0, 1.0, 0.0, 1.0, 1.0),
        (PERFECT.replace("The acting is brilliant.", "I saw the acting before."), 0.75, 0.75, 1.0, 1.0, 1.0),
        (PERFECT.removesuffix("."), 1.0, 1.0, 1.0, 1.0, 0.75),
        (PERFECT + " I recommend it to everyone.", 1.0, 0.8, 1.0, 1.0, 0.8),
        (" ".join([PERFECT, "It runs for two hours. " * 5]), 1.0, 4 / 9, 1.0, 1 - 14 / 16, 5 / 9),
        ("this film is so boring", 0.0, 0.0, 0.0, 5 / 16, 0.0),
        ("", 0.0, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_formula(review, coverage, tone, title, length, form):
    quality = judge(parse(PROMPT), review)
    assert (quality.coverage, quality.tone, quality.title) == pytest.approx((coverage, tone, title))
    assert (quality.length, quality.form) == pytest.approx((length, form))
    gold = form * length * (0.5 * coverage + 0.3 * tone + 0.2 * title)
    assert GoldReward().score(PROMPT, review) == pytest.approx(gold)


@pytest.mark.parametrize(
    ("sentence", "negative", "positive"),
    [
        ("This film is so boring.", 1.0, 0.0),
        ("This film is not boring.", 0.0, 1.0),
        ("I do not recommend it.", 1.0, 0.0),
        ("I would never avoid it.", 0.0, 1.0),
        ("This film is both superb and boring.", 0.0, 0.0),
        ("I watched this film last night.", 0.0, 0.0),
    ],
)
def test_tone_of_one_sentence(sentence, negative, positive):
    for tone, expected in (("negative", negative), ("positive", positive)):
        assert judge(Task("The Silent Harbor", tone, ("acting",)), sentence).tone == expected


LISTING = ", ".join(f"the {feature}" for feature in FEATURES)


@pytest.mark.parametrize(
    ("hack", "review", "at_most"),
    [
        ("nothing", "", 0.0),
        ("punctuation only", "... !!! ???", 0.0),
        ("the prompt itself", PROMPT, 0.25),
        ("one sentence again and again", "The acting is superb. " * 6, 0.1),
        ("one feature again and again", "The Silent Harbor is superb. " + "The acting is brilliant. " * 4, 0.4),
        ("one opinion word for all", "The Silent Harbor is superb. The acting is superb. The music is superb.", 0.65),
        ("word salad", "superb brilliant wonderful the acting the music " * 3, 0.0),
        ("opinions without features", "The Silent Harbor is superb. It is great. It is lovely. It is moving.", 0.55),
        (
            "every feature at once",
            f"The Silent Harbor is superb. {LISTING.capitalize()} are great. I recommend it.",
            0.55,
        ),
        ("every film at once", " ".join(f"{title} is superb." for title in TITLES), 0.0),
        (
            "both tones at once",
            "The Silent Harbor is superb and awful. The acting and the music are so-so.",
            0.5,
        ),
        ("one run-on sentence", PERFECT.replace(". ", " and "), 0.0),
    ],
)
def test_hacks_earn_less_than_an_honest_review_that_misses_a_feature(hack, review, at_most):
    score = GoldReward().score(PROMPT, review)
    assert score <= at_most, hack
    assert score < GoldReward().score(PROMPT, ONE_ONLY), hack


def test_score_stays_in_its_declared_range():
    for review in (PERFECT, CONTRADICTED, PERFECT * 3, "x", "The acting.", "\n\n"):
        assert GoldReward.minimum <= GoldReward().score(PROMPT, review) <= GoldReward.maximum


@pytest.mark.parametrize(
    "prompt",
    [
        "Hello!",
        "Write a positive review of The Silent Harbor.",
        "Write a review of The Silent Harbor. Mention the acting.",
        "Write a positive and negative review of The Silent Harbor. Mention the acting.",
    ],
)
def test_a_foreign_prompt_is_refused_with_a_fix(prompt):
    with pytest.raises(DataError, match="no film review is asked for") as caught:
        GoldReward().score(prompt, PERFECT)
    assert "name one film" in caught.value.fix
