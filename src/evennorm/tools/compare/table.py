"""Turn the records of all runs into a table with a row per placement and learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from evennorm.tools.compare.measure import Metric
from evennorm.tools.compare.racing import Race, cell
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.statistics import interval
from evennorm.tools.compare.train import Record


@dataclass(frozen=True)
class Row:
    """A placement at a learning rate, over its repeats, after the last epoch. Accuracies are shares of 1; of another metric
    its values stand in their place.
    """

    placement: str
    learning_rate: float
    test_accuracy: float
    low: float | None
    high: float | None
    """95 % interval of the mean over repeats; None for one repeat."""

    epochs_to_reference: int | None
    """The first epoch whose mean test accuracy reaches what `none` ends at, at this rate; None where it never does, or where
    no run of `none` learned anything at this rate.
    """

    seconds_per_epoch: float | None
    """Median over all epochs but the first of each run, which may include compilation; None where there is no other."""

    gap: float
    """Training minus test accuracy, both in inference mode."""

    diverged: int
    """Number of runs whose loss stopped being finite."""

    chosen: int
    """Number of repeats that the placement is judged by, where this is the rate that validation chose; else 0."""

    curve: list[float]
    """Mean test accuracy after each epoch."""

    repeats: int = 0
    at_chance: int = 0
    """Number of runs that stayed finite and ended no better than guessing."""

    epochs: float = 0.0
    """Mean number of epochs of a run."""


def curve(record: Record, epochs: int) -> list[float]:
    """Return test accuracy after each epoch; a run that stopped early keeps its last value."""
    return record.test_accuracy + record.test_accuracy[-1:] * (epochs - len(record.test_accuracy))


def longest(records: Iterable[Record]) -> int:
    """Return the number of epochs of the longest run."""
    return max(len(record.test_accuracy) for record in records)


def rows(settings: Settings, records: Mapping[Run, Record], race: Race, step: float) -> list[Row]:
    """Return the table, in the order of placements and rates.

    Args:
        settings, records, race: of a study that is over.
        step: accuracy that one test sample is worth.
    """
    epochs = longest(records.values())
    return [
        _row(settings.measure, placement, rate, records, race, step, epochs)
        for placement in settings.placements
        for rate in settings.learning_rates
    ]


def _row(
    metric: Metric, placement: str, rate: float, records: Mapping[Run, Record], race: Race, step: float, epochs: int
) -> Row:
    runs = cell(records, placement, rate)
    last = np.array([record.test_accuracy[-1] for record in runs])
    low, high = metric.inside(interval(last, floor=step)) or (None, None)
    mean_curve = np.mean([curve(record, epochs) for record in runs], axis=0)
    later = [seconds for record in runs for seconds in record.seconds[1:]]
    return Row(
        placement,
        rate,
        test_accuracy=float(last.mean()),
        low=low,
        high=high,
        epochs_to_reference=_epochs_to_reference(metric, mean_curve, reference(records, rate)),
        seconds_per_epoch=float(np.median(later)) if later else None,
        gap=float(np.mean([metric.score(run.train_accuracy[-1]) - metric.score(run.test_accuracy[-1]) for run in runs])),
        diverged=sum(record.diverged for record in runs),
        chosen=len(runs) if race.chosen.get(placement) == rate else 0,
        curve=mean_curve.tolist(),
        repeats=len(runs),
        at_chance=sum(not (record.learned or record.diverged) for record in runs),
        epochs=float(np.mean([len(record.test_accuracy) for record in runs])),
    )


def reference(records: Mapping[Run, Record], rate: float) -> float | None:
    """Return the mean accuracy at which `none` ends, at a rate; None where it is not trained or no run of it learned."""
    runs = cell(records, "none", rate)
    if not any(record.learned for record in runs):
        return None
    return float(np.mean([record.test_accuracy[-1] for record in runs]))


def _epochs_to_reference(metric: Metric, mean_curve: np.ndarray, reference: float | None) -> int | None:
    sign = metric.score(1.0)
    return epochs_to_reach(sign * mean_curve, None if reference is None else sign * reference)


def epochs_to_reach(mean_curve: np.ndarray, reference: float | None) -> int | None:
    """Return the first epoch, from 1, whose accuracy is the reference or more; None where there is none.

    Example:
        >>> epochs_to_reach(np.array([0.1, 0.5, 0.4, 0.6]), 0.5)
        2
    """
    if reference is None:
        return None
    reached = mean_curve >= reference - 1e-9  # the same mean of the same numbers, added in another order
    return int(reached.argmax()) + 1 if reached.any() else None
