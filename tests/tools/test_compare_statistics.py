"""Intervals, chosen rates and claimed differences, beside hand-worked numbers and simulations whose truth is known."""

import numpy as np
import pytest

from evennorm.tools.compare.statistics import choose_rate, differences, interval, repeats_needed

FINE = 1e-6


def test_interval_of_three_values_as_in_a_table_of_students_t():
    # t(0.975, 2 degrees of freedom) = 4.3027; standard deviation 0.1
    low, high = interval(np.array([0.8, 0.9, 1.0]))
    assert low == pytest.approx(0.9 - 4.3027 * 0.1 / 3**0.5, abs=1e-5)
    assert high == pytest.approx(0.9 + 4.3027 * 0.1 / 3**0.5, abs=1e-5)


def test_one_value_has_no_interval():
    assert interval(np.array([0.5])) is None


def test_a_difference_is_paired():
    """Repeats that differ a lot among themselves, and hardly in what the placement does to them."""
    none = np.array([0.50, 0.70, 0.90])
    [found] = differences({"none": none, "before": none + np.array([0.010, 0.011, 0.012])}, FINE)
    assert (found.better, found.worse, found.shown) == ("before", "none", True)
    assert found.difference == pytest.approx(0.011)
    assert found.high - found.low == pytest.approx(2 * 4.3027 * 0.001 / 3**0.5, abs=1e-6)


def test_with_several_pairs_each_interval_is_wider():
    scores = {"none": np.array([0.1, 0.2, 0.4]), "before": np.array([0.3, 0.3, 0.4]), "after": np.array([0.2, 0.2, 0.2])}
    [alone] = differences({name: scores[name] for name in ("none", "before")}, FINE)
    among = next(pair for pair in differences(scores, FINE) if {pair.better, pair.worse} == {"none", "before"})
    # t(1 - 0.025 / 3, 2 degrees of freedom) = 7.6488 against 4.3027
    assert (among.high - among.low) / (alone.high - alone.low) == pytest.approx(7.6488 / 4.3027, rel=1e-4)


def test_pairs_come_with_the_better_one_first_and_the_largest_difference_first():
    scores = {"none": np.array([0.1, 0.1]), "before": np.array([0.4, 0.4]), "after": np.array([0.3, 0.3])}
    found = [(pair.better, pair.worse) for pair in differences(scores, FINE)]
    assert found == [("before", "none"), ("after", "none"), ("before", "after")]


def test_repeats_that_agree_by_chance_prove_nothing():
    """Three repeats, one test sample of 100 more each: their spread is 0, but the count of samples is coarse."""
    [found] = differences({"none": np.array([0.9, 0.8, 0.7]), "before": np.array([0.91, 0.81, 0.71])}, 0.01)
    assert not found.shown
    assert found.low < 0 < found.high
    assert found.repeats_needed > 3


def test_one_repeat_shows_nothing():
    [found] = differences({"none": np.array([0.1]), "before": np.array([0.9])}, 0.01)
    assert (found.low, found.high, found.shown, found.repeats_needed) == (None, None, False, None)


def test_no_difference_at_all():
    [found] = differences({"none": np.array([0.1, 0.2]), "before": np.array([0.1, 0.2])}, 0.01)
    assert (found.difference, found.shown, found.repeats_needed) == (0, False, None)


def test_placements_without_a_difference_are_rarely_told_apart():
    """Four placements, six pairs: a claim in any pair is wrong here, and may happen in 5 % of comparisons at most."""
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        scores = {name: random.normal(0.9, 0.01, 5) for name in ("none", "before", "after", "input")}
        wrong += any(pair.shown for pair in differences(scores, FINE))
    assert wrong / 300 < 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5


@pytest.mark.parametrize("effect", [0.5, 1.0, 2.0])
def test_the_repeats_needed_show_the_difference_four_times_out_of_five(effect):
    random = np.random.default_rng(1)
    repeats = repeats_needed(effect, 1.0)
    found = [interval(random.normal(effect, 1.0, repeats))[0] > 0 for _ in range(400)]
    assert 0.7 < np.mean(found) < 0.9


def test_more_than_a_thousand_repeats_are_not_counted():
    assert repeats_needed(0.001, 1.0) is None


def test_a_rate_is_chosen_by_the_mean_of_all_repeats():
    assert choose_rate(np.array([[0.9, 0.1, 0.1], [0.2, 0.3, 0.3], [0.1, 0.2, 0.2]])) == 0
    assert choose_rate(np.array([[0.1, 0.2], [0.3, 0.3]])) == 1


def test_equal_rates_choose_the_first():
    assert choose_rate(np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])) == 0


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_choosing_rates_makes_no_false_claims(shared):
    """Two rates of one true accuracy, 20 repeats, however much test and validation share of a run's luck."""
    random = np.random.default_rng(2)
    wrong = 0
    for _ in range(600):
        scores = {}
        for name in ("none", "before"):
            run, of_test, of_validation = random.normal(0.9, 0.01, (3, 2, 20))
            test, validation = (shared**0.5 * run + (1 - shared) ** 0.5 * part for part in (of_test, of_validation))
            scores[name] = test[choose_rate(validation)]
        wrong += differences(scores, FINE)[0].shown
    assert wrong / 600 < 0.05 + 2 * (0.05 * 0.95 / 600) ** 0.5
