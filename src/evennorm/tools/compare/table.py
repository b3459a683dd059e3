"""The records of all runs go in; a row per placement and learning rate, and the verdict in one sentence, come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.statistics import MOST_REPEATS, Difference, choose_rates, differences, interval
from evennorm.tools.compare.train import Record


@dataclass(frozen=True)
class Row:
    """A placement at a learning rate, over its repeats. Accuracies are shares of 1, after the last epoch."""

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
    chosen: int
    """In how many repeats this is the rate that the placement is judged at."""

    curve: list[float]
    """Mean test accuracy after each epoch."""


def curve(record: Record, epochs: int) -> list[float]:
    """Test accuracy after each epoch; a run that stopped early keeps its last."""
    return record.test_accuracy + record.test_accuracy[-1:] * (epochs - len(record.test_accuracy))


def rows(settings: Settings, records: Mapping[Run, Record]) -> list[Row]:
    """The table, in the order of placements and rates."""
    chosen = {
        placement: choose_rates(_grid(settings, records, placement, "validation")) for placement in settings.placements
    }
    references = _references(settings, records)
    table = []
    for placement in settings.placements:
        for index, rate in enumerate(settings.learning_rates):
            runs = [records[Run(placement, rate, repeat)] for repeat in range(settings.repeats)]
            last = np.array([record.test_accuracy[-1] for record in runs])
            low, high = interval(last) or (None, None)
            mean_curve = np.mean([curve(record, settings.epochs) for record in runs], axis=0)
            later = [seconds for record in runs for seconds in record.seconds[1:]]
            row = Row(
                placement,
                rate,
                test_accuracy=float(last.mean()),
                low=low,
                high=high,
                epochs_to_reference=epochs_to_reach(mean_curve, references[index]),
                seconds_per_epoch=float(np.median(later)) if later else None,
                gap=float(np.mean([record.train_accuracy[-1] - record.test_accuracy[-1] for record in runs])),
                diverged=sum(record.diverged for record in runs),
                chosen=int((chosen[placement] == index).sum()),
                curve=mean_curve.tolist(),
            )
            table.append(row)
    return table


def paired_differences(settings: Settings, records: Mapping[Run, Record], test_samples: int) -> list[Difference]:
    """Every pair of placements, each placement judged at the learning rate that validation chose."""
    scores = {}
    for placement in settings.placements:
        chosen = choose_rates(_grid(settings, records, placement, "validation"))
        scores[placement] = _grid(settings, records, placement, "test")[chosen, np.arange(settings.repeats)]
    return differences(scores, 1 / test_samples)


def unlearned(settings: Settings, records: Mapping[Run, Record]) -> frozenset[str]:
    """The placements of which no run, at any rate, ended better than guessing."""
    return frozenset(
        placement
        for placement in settings.placements
        if all(record.diverged for run, record in records.items() if run.placement == placement)
    )


def verdict(settings: Settings, pairs: Sequence[Difference], unlearned: frozenset[str] = frozenset()) -> str:
    """One sentence that claims what the intervals show, and nothing else; of placements that did not learn, that alone."""
    if unlearned.issuperset(settings.placements):
        return (
            "No run learned: all ended no better than guessing, so that placements cannot be compared; train longer "
            "(--epochs) or at other rates (--learning-rates)."
        )
    if not pairs:
        return f"Only {settings.placements[0]} was trained, so there is nothing to compare it with."
    if settings.repeats == 1:
        return "One repeat tells nothing about chance, so no difference can be claimed: use --repeats 5 or more."
    shown = [pair for pair in pairs if pair.shown and not {pair.better, pair.worse} <= unlearned]
    mute = [pair for pair in pairs if {pair.better, pair.worse} <= unlearned]
    rest = [pair for pair in pairs if not pair.shown and pair not in mute]
    parts = []
    if shown:
        claims = [
            f"with {p.better} than with {p.worse} by {_points(p.difference)} ({_points(p.low)} to {_points(p.high)})"
            for p in shown
        ]
        parts.append(f"test accuracy is higher {_listed(claims)} percentage points")
    if rest:
        between = _listed([f"{p.better} and {p.worse}" for p in rest], "or between")
        needed = _listed([str(p.repeats_needed or f"more than {MOST_REPEATS}") for p in rest])
        parts.append(f"no difference could be shown between {between}, which would probably need {needed} repeats")
    if mute:
        names = [placement for placement in settings.placements if placement in unlearned]
        parts.append(f"no run with {_listed(names)} learned anything, so that these cannot be compared")
    return f"In {settings.repeats} paired repeats, each placement at the rate that validation chose, {'; '.join(parts)}."


def _points(accuracy: float | None) -> str:
    return f"{100 * (accuracy or 0):.1f}"


def _listed(parts: Sequence[str], last: str = "and") -> str:
    return ", ".join(parts[:-1]) + f" {last} " * (len(parts) > 1) + parts[-1]


def _grid(settings: Settings, records: Mapping[Run, Record], placement: str, part: str) -> np.ndarray:
    """Final accuracies of one placement as (rates, repeats)."""
    cells = [
        [records[Run(placement, rate, repeat)] for repeat in range(settings.repeats)] for rate in settings.learning_rates
    ]
    return np.array(
        [[r.validation_accuracy if part == "validation" else r.test_accuracy[-1] for r in line] for line in cells]
    )


def _references(settings: Settings, records: Mapping[Run, Record]) -> list[float | None]:
    """The accuracy that `none` ends at, at each rate; None where it is not trained or no run of it learned."""
    if "none" not in settings.placements:
        return [None] * len(settings.learning_rates)
    runs = [[records[Run("none", rate, i)] for i in range(settings.repeats)] for rate in settings.learning_rates]
    return [None if all(r.diverged for r in line) else float(np.mean([r.test_accuracy[-1] for r in line])) for line in runs]


def epochs_to_reach(mean_curve: np.ndarray, reference: float | None) -> int | None:
    """The first epoch, from 1, whose accuracy is the reference or more; None where there is none.

    Example:
        >>> epochs_to_reach(np.array([0.1, 0.5, 0.4, 0.6]), 0.5)
        2
    """
    if reference is None:
        return None
    reached = mean_curve >= reference - 1e-9  # the same mean of the same numbers, added in another order
    return int(reached.argmax()) + 1 if reached.any() else None
