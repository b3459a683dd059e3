"""Intervals, chosen rates and claimed differences, beside hand-worked numbers and simulations whose truth is known."""

import numpy as np
import pytest

from evennorm.tools.compare.statistics import choose_rates, differences, interval, repeats_needed

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


def test_rates_are_chosen_by_the_other_repeats():
    # Repeat 0 is best at rate 0, but the others are better at rate 1, and only they decide; and so on.
    validation = np.array([[0.9, 0.1, 0.1], [0.2, 0.3, 0.3], [0.1, 0.2, 0.2]])
    assert choose_rates(validation).tolist() == [1, 0, 0]


def test_equal_rates_choose_the_first():
    assert choose_rates(np.full((3, 4), 0.1)).tolist() == [0, 0, 0, 0]


def test_choosing_rates_does_not_flatter():
    """Six rates of one true accuracy: the best of them by its own runs looks better than it is, the chosen one does not."""
    random = np.random.default_rng(2)
    chosen, flattered = [], []
    for _ in range(400):
        accuracy = random.normal(0.9, 0.01, (6, 5))
        chosen.append(accuracy[choose_rates(accuracy), np.arange(5)].mean())
        flattered.append(accuracy[accuracy.mean(axis=1).argmax()].mean())
    assert np.mean(chosen) == pytest.approx(0.9, abs=0.001)
    assert np.mean(flattered) > 0.904
