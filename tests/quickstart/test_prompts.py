"""Prompts: what is written can be read back, and a fixed share of tasks is held out."""

from random import Random

import pytest

from align.quickstart.prompts import HELDOUT_ONE_IN, TEMPLATES, Task, parse, render
from align.quickstart.reviews import draw_task


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("features", [("acting",), ("plot", "music"), ("ending", "humor", "acting")])
def test_parse_reads_back_what_render_wrote(template, features):
    task = Task("The Lonely Tower", "negative", features)
    assert parse(render(task, template)) == task


def test_render_lists_features_in_plain_english():
    task = Task("The Silent Harbor", "positive", ("acting", "music", "plot"))
    expected = "Write a positive review of The Silent Harbor. Mention the acting, the music and the plot."
    assert render(task, TEMPLATES[0]) == expected


def test_the_order_of_features_does_not_decide_what_is_held_out():
    for features in (("acting", "plot"), ("music", "humor", "ending")):
        verdicts = {Task("The Gentle River", "positive", order).is_heldout() for order in (features, features[::-1])}
        assert len(verdicts) == 1


def test_about_one_task_in_ten_is_held_out():
    rng = Random(0)
    share = sum(draw_task(rng)[0].is_heldout() for _ in range(5000)) / 5000
    assert share == pytest.approx(1 / HELDOUT_ONE_IN, abs=0.02)
