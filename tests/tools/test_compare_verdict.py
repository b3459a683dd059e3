"""What a comparison says in the end, by hand: no claim beyond what the intervals show, and what to do next."""

import numpy as np
import pytest

from evennorm.tools.compare.racing import race
from evennorm.tools.compare.settings import Run
from evennorm.tools.compare.verdict import NOTHING_LEARNED, verdict
from tests.tools.comparing import record, settings

NONE = np.array([0.70, 0.71, 0.72, 0.73])


def said(given, scores, step=0.001, **unlearned):
    records = {
        Run(name, rate, i): record(float(score), learned=name not in unlearned)
        for name, values in scores.items()
        for rate in given.learning_rates
        for i, score in enumerate(values)
    }
    return verdict(given, records, race(given, records, step)).splitlines()


def test_a_line_for_each_pair_then_what_is_best_and_what_to_do(tmp_path):
    given = settings(tmp_path, placements=("none", "before", "after"), repeats=4)
    scores = {
        "none": NONE,
        "before": NONE + np.array([0.10, 0.11, 0.10, 0.11]),
        "after": NONE + np.array([0.11, 0.09, 0.10, 0.14]),
    }
    assert said(given, scores) == [
        "after above none by 11.0 points (5.8 to 16.2), 4 repeats",
        "before above none by 10.5 points (9.1 to 11.9), 4 repeats",
        "after and before not told apart: 0.5 (-4.6 to 5.6), 4 repeats; 185 may do",
        "",
        "Best are after and before, which could not be told apart.",
        "Use after, at learning rate 0.1.",
        "As far as is known, before at 0.1 will do too.",
        "They are so close that telling them apart may take 185 repeats.",
    ]


def test_equal_within_a_margin(tmp_path):
    given = settings(tmp_path, repeats=4, equivalent=0.02)
    near = NONE + np.array([0.001, -0.001, 0.001, -0.001])
    assert said(given, {"none": NONE, "before": near}) == [
        "none and before equal within 2.0 points (-0.2 to 0.2), 4 repeats",
        "",
        "All placements are equally accurate, within 2.0 points.",
        "Use none, at learning rate 0.1.",
        "As far as is known, before at 0.1 will do too.",
    ]


def test_one_that_is_best(tmp_path):
    given = settings(tmp_path, repeats=4)
    assert said(given, {"none": NONE, "before": NONE + 0.1})[-2:] == [
        "Best is before, above none.",
        "Use before, at learning rate 0.1.",
    ]


def test_where_nothing_can_be_claimed(tmp_path):
    one = settings(tmp_path, repeats=1)
    assert said(one, {"none": NONE[:1], "before": NONE[:1]}) == [
        "One repeat tells nothing about chance, so no difference can be claimed: use --repeats 5 or more."
    ]
    alone = settings(tmp_path, placements=("none",), repeats=4)
    assert said(alone, {"none": NONE}) == ["Only none was trained, so there is nothing to compare it with."]


@pytest.mark.parametrize("sequential", [False, True])
def test_where_nothing_was_learned(tmp_path, sequential):
    """No repeats are forecast: more of the same would show as little. Nor are any added."""
    given = settings(tmp_path, placements=("none", "before", "after"), repeats=3, sequential=sequential)
    chance = np.array([0.1, 0.12, 0.11])
    scores = {"none": chance, "before": chance[::-1], "after": chance + 0.6}
    found = said(given, scores, none=True, before=True)
    assert "no run with none and before learned anything" in found
    assert not any("before and none" in line or "none and before not" in line or "may do" in line for line in found)
    assert "\n".join(said(given, scores, none=True, before=True, after=True)) == NOTHING_LEARNED


def test_lines_are_short(tmp_path):
    given = settings(tmp_path, placements=("none", "before", "after", "input"), repeats=3)
    random = np.random.default_rng(0)
    scores = {name: random.uniform(0, 1, 3) for name in given.placements}
    assert max(map(len, said(given, scores))) <= 80
