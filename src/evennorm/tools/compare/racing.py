"""Decide from finished runs which runs are worth training next, and which pairs of placements are told apart by now.

Decisions are a function of the records alone, look by look from the first: an interrupted study, or several processes, come
to the same runs and the same verdict. After each look (`confidence.LOOKS`)

- a pair of placements is closed once its interval excludes 0, or lies within the margin that counts as no difference;
- a placement of which every pair is closed is not trained any more;
- a learning rate whose validation accuracy is shown to be below that of the placement's best rate is dropped, as is one at
  which no run stayed finite (racing: Maron and Moore, "Hoeffding races", 1994).

Test samples have no part in dropping rates, so that what is dropped cannot flatter what stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from evennorm.tools.compare.confidence import looks_until
from evennorm.tools.compare.settings import DEFAULT_REPEATS, Run, Settings
from evennorm.tools.compare.statistics import Difference, choose_rate, compared, half_width, pair_confidence
from evennorm.tools.compare.train import Record


@dataclass
class Race:
    """The state of a study."""

    runs: list[Run]
    """All runs that were worth training so far, in the order they are trained in."""

    rates: dict[str, tuple[float, ...]]
    """The learning rates of each placement that are not dropped."""

    chosen: dict[str, float] = field(default_factory=dict)
    """The rate at which each placement is judged."""

    pairs: dict[tuple[str, str], Difference] = field(default_factory=dict)
    """What is known of each pair, from the look that closed it or the last one."""

    over: bool = False
    """Whether nothing is left to train."""

    @property
    def differences(self) -> list[Difference]:
        """All pairs, the largest difference first."""
        return sorted(self.pairs.values(), key=lambda pair: -pair.difference)


def race(settings: Settings, records: Mapping[Run, Record], step: float) -> Race:
    """Return the state of the study with these finished runs.

    Args:
        settings: a fixed design trains every run and looks once.
        records: of finished runs; those of runs that are not worth training are ignored.
        step: accuracy that one test sample is worth.
    """
    state = Race([], dict.fromkeys(settings.placements, settings.learning_rates))
    every = list(combinations(settings.placements, 2))
    left, done, learned = list(every), 0, set[str]()
    for look in _looks(settings):
        active = [name for name in settings.placements if not every or any(name in pair for pair in left)]
        state.runs += _between(settings, state.rates, active, done, look)
        done = look
        if any(run not in records for run in state.runs):
            return state
        scores = {name: _judge(settings, state, records, name, look) for name in active}
        found = _compare(settings, scores, left, len(every), step)
        state.pairs |= found
        learned |= {name for name in active if name not in learned and _learns(state, records, name)}
        left = [pair for pair in left if not (found[pair].shown or found[pair].equivalent or learned.isdisjoint(pair))]
        if not left:
            break
        if settings.sequential:
            for name in active:
                _drop_rates(settings, state, records, name, look, step)
    state.over = True
    return state


def _learns(state: Race, records: Mapping[Run, Record], placement: str) -> bool:
    return any(records[run].learned for run in state.runs if run.placement == placement)


def rate_differences(settings: Settings, records: Mapping[Run, Record], step: float) -> dict[float, list[Difference]]:
    """Return the pairs at each learning rate by itself; intervals of all pairs and rates hold together with 95 %.

    Both placements of a pair have been trained at a rate until a look, or one of them was dropped at an earlier look.
    """
    pairs = list(combinations(settings.placements, 2))
    found: dict[float, list[Difference]] = {}
    for rate in settings.learning_rates:
        tests = {
            name: np.array([settings.measure.score(record.test_accuracy[-1]) for record in cell(records, name, rate)])
            for name in settings.placements
        }
        for first, second in pairs:
            count = min(len(tests[first]), len(tests[second]))
            look = count if settings.sequential and len(settings.placements) > 1 else None
            confidence = pair_confidence(len(pairs) * len(settings.learning_rates), look)
            scores = {name: tests[name][:count] for name in (first, second)}
            margin = settings.equivalent
            pair = compared(first, second, scores, step, confidence, margin, None, _most(settings))
            found.setdefault(rate, []).append(pair)
    return found


def planned(settings: Settings, records: Mapping[Run, Record], step: float) -> list[Run]:
    """Return the runs that are worth training: those of the race and, once it is over, those from other initial weights."""
    state = race(settings, records, step)
    return state.runs + scaled(settings, state) if state.over else state.runs


def scaled(settings: Settings, state: Race) -> list[Run]:
    """Return the runs from other initial weights, each placement at the rate that it is judged at."""
    return [run for run in settings.scaled_runs if state.chosen[run.placement] == run.learning_rate]


def unlearned(settings: Settings, records: Mapping[Run, Record]) -> frozenset[str]:
    """Return the placements for which no run, at any rate, ended better than guessing."""
    learned = {run.placement for run, record in records.items() if record.learned}
    return frozenset(settings.placements) - learned


def cell(records: Mapping[Run, Record], placement: str, rate: float) -> list[Record]:
    """Return the records of a placement at a rate, repeat by repeat; in a sequential study their numbers differ.

    Example:
        >>> cell({}, "none", 0.1)
        []
    """
    found: list[Record] = []
    while (run := Run(placement, rate, len(found))) in records:
        found.append(records[run])
    return found


def _looks(settings: Settings) -> Sequence[int]:
    if not settings.sequential:
        return (settings.repeats,)
    if len(settings.placements) == 1:  # nothing to decide
        return (min(settings.repeats, DEFAULT_REPEATS),)
    return looks_until(settings.repeats)


def _between(
    settings: Settings, rates: dict[str, tuple[float, ...]], active: Sequence[str], first: int, last: int
) -> Iterator[Run]:
    """Yield the runs from one look to the next; placements take turns, so that disturbances affect all timings alike."""
    for repeat in range(first, last):
        for rate in settings.learning_rates:
            yield from (Run(name, rate, repeat) for name in active if rate in rates[name])


def _validation(
    settings: Settings, records: Mapping[Run, Record], placement: str, rates: Sequence[float], look: int
) -> np.ndarray:
    """Return validation scores (rates, repeats): accuracies, or another metric's values turned so that higher is better."""
    score = settings.measure.score
    return np.array(
        [[score(records[Run(placement, rate, repeat)].validation_accuracy) for repeat in range(look)] for rate in rates]
    )


def _judge(settings: Settings, state: Race, records: Mapping[Run, Record], placement: str, look: int) -> np.ndarray:
    """Judge a placement: return the test accuracy (repeats,) at the rate that validation chose."""
    rates = state.rates[placement]
    rate = rates[choose_rate(_validation(settings, records, placement, rates, look))]
    state.chosen[placement] = rate
    score = settings.measure.score
    return np.array([score(records[Run(placement, rate, repeat)].test_accuracy[-1]) for repeat in range(look)])


def _compare(
    settings: Settings, scores: dict[str, np.ndarray], left: list[tuple[str, str]], pairs: int, step: float
) -> dict[tuple[str, str], Difference]:
    """Compare the pairs that are left; their intervals allow for all pairs, closed ones included."""
    look = len(next(iter(scores.values()))) if settings.sequential else None
    confidence = pair_confidence(pairs, look)
    looking = pairs if settings.sequential else None
    most = _most(settings)
    return {pair: compared(*pair, scores, step, confidence, settings.equivalent, looking, most) for pair in left}


def _most(settings: Settings) -> float:
    """Return the largest possible difference."""
    return 1.0 if settings.measure.is_share else math.inf


def _drop_rates(
    settings: Settings, state: Race, records: Mapping[Run, Record], placement: str, look: int, step: float
) -> None:
    rates = state.rates[placement]
    if len(rates) == 1:
        return
    validation = _validation(settings, records, placement, rates, look)
    best = choose_rate(validation)
    confidence = pair_confidence(len(rates) - 1, look)
    kept = []
    for index, rate in enumerate(rates):
        behind = validation[best] - validation[index]
        bound = half_width(max(float(np.std(behind, ddof=1)), step), look, confidence)
        exploded = all(records[Run(placement, rate, repeat)].diverged for repeat in range(look))
        if index == best or not (exploded or behind.mean() > bound):
            kept.append(rate)
    state.rates[placement] = tuple(kept)
