"""The table of a comparison, by hand: chosen rates, intervals within 0 to 100 %, epochs, runs at chance or not finite."""

import numpy as np
import pytest

from evennorm.tools.compare.racing import race
from evennorm.tools.compare.settings import Run
from evennorm.tools.compare.table import epochs_to_reach, rows
from tests.tools.comparing import record, settings

STEP = 0.01


def table(given, records):
    return rows(given, records, race(given, records, STEP), STEP)


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
    found = {(row.placement, row.learning_rate): row for row in table(given, records)}
    none = found["none", 0.1]
    assert none.test_accuracy == pytest.approx(0.6)
    assert none.curve == pytest.approx([0.1, 0.6])
    assert (none.chosen, found["none", 0.5].chosen, found["before", 0.1].chosen, found["before", 0.5].chosen) == (2, 0, 0, 2)
    # t(0.975, 1 degree of freedom) = 12.7062; standard deviation of 0.5 and 0.7 is 0.1 * sqrt(2)
    assert (none.low, none.high) == (0, 1), "6 standard errors, and no share is below 0 or above 1"
    chosen = found["before", 0.5]
    assert chosen.low == pytest.approx(0.85 - 12.7062 * 0.05, rel=1e-5)
    assert chosen.high == 1
    assert none.epochs_to_reference == 2
    assert found["before", 0.1].epochs_to_reference is None  # 0.55 never reaches 0.6
    assert found["before", 0.5].epochs_to_reference == 2
    assert none.gap == pytest.approx(0.1)
    assert none.seconds_per_epoch == 2  # the first epoch, 9 seconds, includes compilation


def test_epochs_to_reach():
    assert epochs_to_reach(np.array([0.1, 0.5, 0.4, 0.6]), 0.5) == 2
    assert epochs_to_reach(np.array([0.1, 0.5]), 0.6) is None
    assert epochs_to_reach(np.array([0.1, 0.1 + 0.2]), 0.3) == 2


def test_runs_that_agree_prove_nothing(tmp_path):
    """Two runs of one accuracy: the interval is that of a spread of one test sample of 100."""
    given = settings(tmp_path)
    [none, before] = table(given, {run: record(0.5 if run.placement == "none" else 1.0) for run in given.runs})
    assert (none.low, none.high) == pytest.approx((0.5 - 12.7062 * 0.01 / 2**0.5, 0.5 + 12.7062 * 0.01 / 2**0.5), rel=1e-4)
    assert before.low < before.high == 1


def test_runs_at_chance_and_runs_that_exploded_are_told_apart(tmp_path):
    given = settings(tmp_path, placements=("none",), repeats=4)
    kinds = [{}, {"learned": False}, {"learned": False, "diverged": True}, {"learned": False}]
    [row] = table(given, {run: record(**kinds[run.repeat]) for run in given.runs})
    assert (row.repeats, row.at_chance, row.diverged) == (4, 2, 1)


@pytest.mark.parametrize(("learned", "epochs"), [((False, False), None), ((True, False), 2)])
def test_the_way_to_a_reference(tmp_path, learned, epochs):
    """None where every run of `none` stands at chance: there is nothing to reach."""
    given = settings(tmp_path)
    found = table(given, {run: record(learned=learned[run.repeat] or run.placement != "none") for run in given.runs})
    assert [row.epochs_to_reference for row in found] == [epochs] * 2


def test_runs_of_several_lengths(tmp_path):
    """A curve goes on at its last accuracy where a run ended, and no longer than the longest run."""
    given = settings(tmp_path, placements=("none",), epochs=100, until_flat=True)
    curves = [[0.2, 0.4], [0.2, 0.4, 0.8]]
    [row] = table(given, {run: record(test_accuracy=curves[run.repeat]) for run in given.runs})
    assert row.curve == pytest.approx([0.2, 0.4, 0.6])
    assert row.epochs == 2.5
