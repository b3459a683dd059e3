"""Measure what articles praise batch normalization for, each with an interval: time, rates, weights, gap, steadiness.

Each interval holds its own number with 95 %, at the repeats there are. They describe; what may be claimed is the verdict's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evennorm.tools.compare.drift import travel
from evennorm.tools.compare.racing import Race, cell
from evennorm.tools.compare.settings import SCALES, Run, Settings
from evennorm.tools.compare.statistics import interval
from evennorm.tools.compare.train import Record

TOLERANCE = 0.05
"""What a learning rate may cost and still count as tolerated: of accuracy, or of another metric's value at the best rate."""


@dataclass(frozen=True)
class Measure:
    """A mean over repeats with its interval, None for one repeat, in its own unit."""

    mean: float
    low: float | None
    high: float | None
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray, floor: float, least: float = -np.inf) -> Measure:
        """Student's interval, above `least`; the spread is never taken for less than `floor`, the values' resolution."""
        found = np.asarray(values, float)
        low, high = interval(found, floor=floor) or (None, None)
        return cls(float(found.mean()), None if low is None else max(low, least), high, len(found))


@dataclass(frozen=True)
class Advantages:
    """What was measured of one placement, at the learning rate that it is judged at."""

    placement: str
    learning_rate: float
    epochs_to_none: Measure | None
    """Epochs until a run's test accuracy, or other metric, is what the run of `none` with the same seed ends at; None where
    there is no such run that learned, or where a repeat never gets there.
    """

    reached: int
    tried: int
    """Repeats that get there, of so many beside a run of `none` that learned."""

    seconds_to_none: float | None
    """The same in seconds of training: by the median time of an epoch."""

    epochs_of_none: float | None
    """Epochs that `none` itself trained."""

    tolerated: tuple[float, ...]
    """Learning rates that cost less than `TOLERANCE` against the placement's best one, by the whole interval."""

    costly: tuple[float, ...]
    """Learning rates that cost more, by the whole interval; of others it is not known."""

    gap: Measure
    """How much better the metric is on training than on test samples: training minus test accuracy."""

    scales: tuple[tuple[float, Measure], ...] = ()
    """Of initial weights: the factor, and the accuracy that it costs against factor 1; empty where that was not trained."""

    median_travel: Measure | None = None
    """How far the median of one hidden unit's input moved over training, in half-widths of its distribution (15th to 85th
    percentile); None where that was not recorded.
    """

    width_change: Measure | None = None
    """How many times as wide the distribution was at its widest as at its narrowest."""


def advantages(
    settings: Settings, records: Mapping[Run, Record], scaled: Mapping[Run, Record], race: Race, step: float
) -> list[Advantages]:
    """One entry for each placement that learned.

    Args:
        settings, records, race: of a study that is over.
        scaled: records of runs from other initial weights; may be empty.
        step: accuracy that one test sample is worth; 0 of another metric.
    """
    return [
        _of(settings, {**records, **scaled}, race, placement, step)
        for placement in settings.placements
        if any(record.learned for record in cell(records, placement, race.chosen[placement]))
    ]


def _of(settings: Settings, records: Mapping[Run, Record], race: Race, placement: str, step: float) -> Advantages:
    rate = race.chosen[placement]
    runs = cell(records, placement, rate)
    none = cell(records, "none", race.chosen["none"]) if "none" in race.chosen else []
    pairs = [(run, other) for run, other in zip(runs, none, strict=False) if other.learned]
    way = [_epochs_to(settings, run, other.test_accuracy[-1]) for run, other in pairs]
    there = [epochs for epochs in way if epochs is not None]
    seconds = [second for run in runs for second in run.seconds[1:]]
    measured = Measure.of(there, floor=0.5, least=1.0) if there and len(there) == len(way) else None
    tolerated, costly = _tolerance(settings, records, placement, step)
    return Advantages(
        placement,
        rate,
        measured,
        len(there),
        len(way),
        None if measured is None or not seconds else measured.mean * float(np.median(seconds)),
        float(np.mean([len(other.test_accuracy) for _, other in pairs])) if pairs else None,
        tolerated,
        costly,
        Measure.of([_gain(settings, run.train_accuracy[-1], run.test_accuracy[-1]) for run in runs], floor=step),
        _scales(settings, records, placement, rate, runs, step),
        *_travels(runs),
    )


def _gain(settings: Settings, value: float, other: float) -> float:
    """How much better the first value is."""
    return settings.measure.score(value) - settings.measure.score(other)


def _scales(
    settings: Settings, records: Mapping[Run, Record], placement: str, rate: float, runs: Sequence[Record], step: float
) -> tuple[tuple[float, Measure], ...]:
    found = []
    for scale in SCALES:
        others = [records[run] for i in range(len(runs)) if (run := Run(placement, rate, i, scale)) in records]
        pairs = zip(runs, others, strict=False)
        costs = [_gain(settings, run.test_accuracy[-1], other.test_accuracy[-1]) for run, other in pairs]
        if costs:
            found.append((scale, Measure.of(costs, floor=step)))
    return tuple(found)


def _travels(runs: Sequence[Record]) -> tuple[Measure | None, Measure | None]:
    found = [moved for run in runs if run.unit_input and (moved := travel(run.unit_input))]
    if not found:
        return None, None
    medians, widths = zip(*found, strict=True)
    return Measure.of(medians, floor=0.0, least=0.0), Measure.of(widths, floor=0.0, least=1.0)


def _epochs_to(settings: Settings, run: Record, wanted: float) -> int | None:
    return next((epoch for epoch, value in enumerate(run.test_accuracy, 1) if _gain(settings, value, wanted) >= 0), None)


def _tolerance(
    settings: Settings, records: Mapping[Run, Record], placement: str, step: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    score = settings.measure.score
    cells = {
        rate: [score(run.test_accuracy[-1]) for run in cell(records, placement, rate)] for rate in settings.learning_rates
    }
    best = max(cells, key=lambda rate: float(np.mean(cells[rate])))
    allowed = TOLERANCE * (1.0 if settings.measure.is_share else abs(float(np.mean(cells[best]))))
    tolerated, costly = [best], []
    for rate, values in cells.items():
        count = min(len(values), len(cells[best]))
        cost = Measure.of(np.subtract(cells[best][:count], values[:count]), floor=step)
        if rate == best or cost.low is None or cost.high is None:
            continue
        if cost.high < allowed:
            tolerated.append(rate)
        elif cost.low > allowed:
            costly.append(rate)
    return tuple(sorted(tolerated)), tuple(sorted(costly))
