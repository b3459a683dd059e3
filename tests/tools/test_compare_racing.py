"""Which runs a sequential comparison trains, and that it claims no more than 5 % false differences, by simulated studies."""

import numpy as np
import pytest

from evennorm.tools.compare.confidence import LOOKS, looks_until, share
from evennorm.tools.compare.flat import is_flat
from evennorm.tools.compare.racing import race
from evennorm.tools.compare.settings import Run
from evennorm.tools.compare.train import Record
from tests.tools.comparing import record
from tests.tools.comparing import settings as made_settings

FOUR = ("none", "before", "after", "input")
STEP = 1e-6


def settings(**changes):
    return made_settings("out", **{"repeats": 20, "sequential": True} | changes)


def study(given, train, step=STEP, records=None):
    """Trains by `train(run)` whatever the race asks for, until it is over."""
    records = {} if records is None else records
    while not (found := race(given, records, step)).over:
        for run in found.runs:
            if run not in records:
                records[run] = train(run)
    return found, records


class Trained(dict):
    """Records that are trained when they are looked at: the same decisions, without replaying those before each look."""

    def __init__(self, train):
        super().__init__()
        self.train = train

    def __contains__(self, run):
        return True

    def __missing__(self, run):
        self[run] = found = self.train(run)
        return found


def simulated(given, train):
    return race(given, Trained(train), STEP)


def drawn(random, effects, rates=(0.0, 0.0), spread=0.01, shared=0.01):
    """A trainer of pure chance: accuracies around 0.8 with a part that pairs share, test and validation correlated."""
    seeds = random.normal(0, shared, 1000)

    def train(run):
        own = random.normal(0, spread / 2**0.5)
        test, validation = (random.normal(0, spread / 2**0.5) for _ in range(2))
        level = 0.8 + effects.get(run.placement, 0.0) + rates[round(run.learning_rate) - 1] + seeds[run.repeat] + own
        return Record([level + test], [1.0], [level], [1.0], [1.0], level + validation, False)

    return train


@pytest.mark.parametrize("rates", [(0.0,), (0.0, 0.0), (0.0, -0.01)], ids=["one rate", "two equal rates", "a better rate"])
def test_false_claims_in_studies_without_a_difference(rates):
    """In 2,000 studies of four placements in all, 5 % at most claim any difference at any of their looks."""
    random = np.random.default_rng(0)
    given = settings(placements=FOUR, learning_rates=tuple(range(1, 1 + len(rates))), equivalent=1e-9)
    studies = 1000 if len(rates) == 1 else 500
    wrong = looked = 0
    for _ in range(studies):
        found = simulated(given, drawn(random, {}, rates))
        claimed = [pair.repeats for pair in found.differences if pair.shown]
        wrong += bool(claimed)
        looked += max(run.repeat for run in found.runs) == 19
    assert looked > 0.99 * studies, "without a difference nearly all go to the last look"
    assert wrong / studies <= 0.05


def test_false_claims_of_equivalence():
    """A difference of exactly the margin is called none in 5 % of studies at most."""
    random = np.random.default_rng(1)
    given = settings(learning_rates=(1.0,), equivalent=0.02)
    found = [simulated(given, drawn(random, {"before": 0.02})).differences[0] for _ in range(400)]
    assert np.mean([pair.equivalent for pair in found]) <= 0.05
    equal = [simulated(given, drawn(random, {})).differences[0] for _ in range(100)]
    assert np.mean([pair.equivalent for pair in equal]) > 0.9


def test_true_differences_are_found_by_few_runs():
    """Of 4 spreads and more: all are shown by the runs of 6 fixed repeats, and the worse rate is dropped."""
    random = np.random.default_rng(2)
    given = settings(placements=FOUR, learning_rates=(1.0, 2.0), equivalent=0.001)
    effects = {"before": 0.08, "after": 0.04, "input": -0.04}
    runs = []
    for _ in range(50):
        found = simulated(given, drawn(random, effects, rates=(0.0, -0.2)))
        assert all(pair.shown for pair in found.differences)
        assert set(found.rates.values()) <= {(1.0,), (1.0, 2.0)}
        runs.append(len(found.runs))
    assert np.mean(runs) < 48


def test_the_shares_of_all_looks_are_the_whole_error_at_most():
    assert sum(map(share, LOOKS)) < 1
    assert looks_until(20) == (3, 5, 8, 12, 20)


def test_a_closed_pair_stops_and_an_open_one_goes_on():
    given = settings(placements=("none", "before", "after"), learning_rates=(1.0,), equivalent=1e-9)
    random = np.random.default_rng(3)
    found, records = study(given, drawn(random, {"none": -0.5}))
    repeats = {name: max(run.repeat for run in records if run.placement == name) + 1 for name in given.placements}
    assert repeats == {"none": 3, "before": 20, "after": 20}
    assert {frozenset(pair): d.repeats for pair, d in found.pairs.items()} == {
        frozenset({"none", "before"}): 3,
        frozenset({"none", "after"}): 3,
        frozenset({"before", "after"}): 20,
    }


def test_decisions_depend_on_finished_runs_alone():
    """Interrupted after any number of runs, finished in any order, with runs that nobody needs: the same end."""
    given = settings(placements=("none", "before", "after"), learning_rates=(1.0, 2.0))
    values = np.random.default_rng(4).normal(0.8, 0.02, (3, 2, 20, 2))

    def train(run):
        test, validation = values[given.placements.index(run.placement), round(run.learning_rate) - 1, run.repeat]
        return record(float(test) + 0.03 * (run.placement == "before"), float(validation) - 0.1 * (run.learning_rate == 2))

    found, records = study(given, train)
    everything = {run: train(run) for run in given.runs}
    assert len(records) < len(everything)
    backwards, again = study(given, train, records={run: everything[run] for run in reversed(list(everything))})
    assert (backwards.runs, backwards.pairs, backwards.rates) == (found.runs, found.pairs, found.rates)
    assert len(again) == len(everything)
    for kept in range(0, len(found.runs), 7):
        resumed, _ = study(given, train, records={run: everything[run] for run in found.runs[-kept:]})
        assert (resumed.runs, resumed.pairs) == (found.runs, found.pairs)


def test_more_repeats_go_on_from_what_is_there():
    """Raising the limit changes no decision that was made."""
    train = drawn(np.random.default_rng(6), {"before": 0.004})
    records = {}
    first, _ = study(settings(repeats=8, learning_rates=(1.0,), equivalent=1e-9), train, records=records)
    assert not first.differences[0].shown
    assert len(records) == 16
    second, _ = study(settings(repeats=60, learning_rates=(1.0,), equivalent=1e-9), train, records=records)
    assert second.runs[:16] == first.runs
    assert second.differences[0].shown or len(records) == 100, "the look at 60 is that at 50"


def test_a_rate_at_which_every_run_exploded_is_dropped():
    given = settings(learning_rates=(1.0, 2.0), placements=("none", "before"), repeats=5, equivalent=1e-9)
    random = np.random.default_rng(6)

    def train(run):
        exploded = run.learning_rate == 2 and run.placement == "none"
        return record(random.normal(0.8, 0.1), random.normal(0.5, 0.4), diverged=exploded, learned=not exploded)

    found, records = study(given, train)
    assert found.rates == {"none": (1.0,), "before": (1.0, 2.0)}
    assert Run("none", 2.0, 3) not in records


def test_nothing_is_added_where_nothing_was_learned():
    found, records = study(settings(), lambda run: record(0.1, 0.1, learned=False))
    assert len(records) == 6
    assert found.over


def test_a_fixed_design_trains_all_and_looks_once():
    given = settings(sequential=False, repeats=4, placements=("none", "before"), learning_rates=(1.0, 2.0))
    found, records = study(given, drawn(np.random.default_rng(7), {"none": -0.5}))
    assert list(records) == given.runs
    assert found.differences[0].repeats == 4


def falling(epochs):
    return np.geomspace(2.0, 0.1, epochs).tolist()


@pytest.mark.parametrize(
    ("losses", "learned", "flat"),
    [
        (falling(10), True, False),
        ([*falling(10), *[0.1] * 5], True, True),
        ([*falling(10), *[0.1] * 4], True, False),
        ([*falling(30), *[0.1] * 9], True, False),  # of 39 epochs, a quarter is 10
        ([*falling(30), *[0.1] * 10], True, True),
        ([*falling(10), *[0.0995] * 5], True, True),
        ([*falling(10), *[0.0985] * 5], True, False),
        ([2.3] * 19, False, False),
        ([2.3] * 20, False, True),
        ([1.0, 0.5, None, None, None, None, None], True, True),
    ],
)
def test_when_a_curve_is_flat(losses, learned, flat):
    assert is_flat(losses, learned, budget=100) is flat
