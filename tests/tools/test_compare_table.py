"""The table of a comparison and its verdict, by hand: chosen rates, intervals, epochs, and no claim beyond what is shown."""

import numpy as np
import pytest

from evennorm.tools.compare.settings import Run
from evennorm.tools.compare.statistics import differences
from evennorm.tools.compare.table import epochs_to_reach, rows, unlearned, verdict
from tests.tools.comparing import record, settings


def made_records(given, accuracies):
    """{placement: (test, validation) as (rates, repeats)}"""
    return {
        Run(placement, rate, repeat): record(test[i][repeat], validation[i][repeat])
        for placement, (test, validation) in accuracies.items()
        for i, rate in enumerate(given.learning_rates)
        for repeat in range(given.repeats)
    }


def test_rows_by_hand(tmp_path):
    given = settings(tmp_path, learning_rates=(0.1, 0.5))
    records = made_records(
        given,
        {
            "none": ([[0.5, 0.7], [0.2, 0.2]], [[0.6, 0.6], [0.2, 0.2]]),
            "before": ([[0.5, 0.6], [0.8, 0.9]], [[0.5, 0.5], [0.8, 0.8]]),
        },
    )
    found = {(row.placement, row.learning_rate): row for row in rows(given, records)}
    none = found["none", 0.1]
    assert none.test_accuracy == pytest.approx(0.6)
    assert none.curve == pytest.approx([0.1, 0.6])
    assert (none.chosen, found["none", 0.5].chosen, found["before", 0.1].chosen, found["before", 0.5].chosen) == (2, 0, 0, 2)
    # t(0.975, 1 degree of freedom) = 12.7062; standard deviation of 0.5 and 0.7 is 0.1 * sqrt(2)
    assert (none.high - none.low) / 2 == pytest.approx(12.7062 * 0.1, rel=1e-5)
    assert none.epochs_to_reference == 2
    assert found["before", 0.1].epochs_to_reference is None  # 0.55 never reaches 0.6
    assert found["before", 0.5].epochs_to_reference == 2
    assert none.gap == pytest.approx(0.1)
    assert none.seconds_per_epoch == 2  # the first epoch, 9 seconds, includes compilation


def test_epochs_to_reach():
    assert epochs_to_reach(np.array([0.1, 0.5, 0.4, 0.6]), 0.5) == 2
    assert epochs_to_reach(np.array([0.1, 0.5]), 0.6) is None
    assert epochs_to_reach(np.array([0.1, 0.1 + 0.2]), 0.3) == 2


def test_the_verdict_claims_what_is_shown(tmp_path):
    given = settings(tmp_path, placements=("none", "before", "after"), repeats=4)
    none = np.array([0.70, 0.71, 0.72, 0.73])
    scores = {
        "none": none,
        "before": none + np.array([0.10, 0.11, 0.10, 0.11]),
        "after": none + np.array([0.11, 0.09, 0.10, 0.14]),
    }
    assert verdict(given, differences(scores, 0.001)) == (
        "In 4 paired repeats, each placement at the rate that validation chose, test accuracy is higher "
        "with after than with none by 11.0 (5.8 to 16.2) and with before than with none by 10.5 (9.1 to 11.9) percentage "
        "points; no difference could be shown between after and before, which would probably need 185 repeats."
    )


def test_the_verdict_where_nothing_can_be_claimed(tmp_path):
    scores = {"none": np.array([0.7]), "before": np.array([0.9])}
    one = settings(tmp_path, repeats=1)
    assert verdict(one, differences(scores, 0.01)) == (
        "One repeat tells nothing about chance, so no difference can be claimed: use --repeats 5 or more."
    )
    alone = settings(tmp_path, placements=("none",))
    assert verdict(alone, []) == "Only none was trained, so there is nothing to compare it with."


def test_the_verdict_where_nothing_was_learned(tmp_path):
    """No repeats are forecast: more of the same would show as little."""
    given = settings(tmp_path, placements=("none", "before", "after"), repeats=2)
    records = {run: record(diverged=run.placement != "after") for run in given.runs}
    assert unlearned(given, records) == {"none", "before"}
    scores = {"none": np.array([0.1, 0.12]), "before": np.array([0.1, 0.13]), "after": np.array([0.5, 0.52])}
    pairs = differences(scores, 0.01)
    found = verdict(given, pairs, unlearned(given, records))
    assert found.endswith("; no run with none and before learned anything, so that these cannot be compared.")
    assert "between before and none" not in found
    assert verdict(given, pairs, frozenset(given.placements)) == (
        "No run learned: all ended no better than guessing, so that placements cannot be compared; train longer (--epochs) "
        "or at other rates (--learning-rates)."
    )
    assert [row.epochs_to_reference for row in rows(given, records)] == [None] * 3


def test_the_way_to_a_reference_that_learned_in_one_run(tmp_path):
    given = settings(tmp_path, repeats=2)
    records = {run: record(diverged=run.repeat == 0) for run in given.runs}
    assert unlearned(given, records) == frozenset()
    assert [row.epochs_to_reference for row in rows(given, records)] == [2, 2]
