"""Compute means, intervals and differences from accuracies of paired repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np

from evennorm.tools.compare.confidence import CONFIDENCE, LOOKS, quantile, share

POWER = 0.8
"""The chance of showing a difference as large as it seems, for which a number of repeats is proposed."""

MOST_REPEATS = 1000


@dataclass(frozen=True)
class Difference:
    """How much more accurate one placement is than another, over paired repeats.

    `low` and `high` belong to intervals that hold for all pairs of a comparison together with 95 % confidence; None for a
    single repeat. `shown`: the interval excludes 0. `repeats_needed`: with so many the difference would probably be
    shown, were it as large as it seems; None where it is shown, or where more than 1000 were needed. `repeats`: so many
    were compared. `equivalent`: the whole interval is within the margin that counts as no difference.
    """

    better: str
    worse: str
    difference: float
    low: float | None
    high: float | None
    shown: bool
    repeats_needed: int | None
    repeats: int = 0
    equivalent: bool = False


def interval(values: np.ndarray, confidence: float = CONFIDENCE, floor: float = 0.0) -> tuple[float, float] | None:
    """Return Student's interval for the mean of independent values; None for fewer than two.

    Args:
        values: one per repeat.
        confidence: chance of holding the mean.
        floor: the least standard deviation to assume. Values that agree do not prove that others would.

    Example:
        >>> low, high = interval(np.array([0.8, 0.9, 1.0]))
        >>> round(low, 4), round(high, 4)
        (0.6516, 1.1484)
    """
    if len(values) < 2:
        return None
    half = half_width(max(float(np.std(values, ddof=1)), floor), len(values), confidence)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def share_interval(values: np.ndarray, step: float, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Return the interval of a mean accuracy: within 0 and 1, and never of no width.

    Args:
        values: accuracies, one per repeat.
        step: accuracy that one test sample is worth, which the spread between repeats is never taken for less than.
        confidence: chance of holding the mean.

    Example:
        >>> [round(end, 2) for end in share_interval(np.array([0.99, 0.99, 0.99]), 0.01)]
        [0.97, 1.0]
    """
    found = interval(values, confidence, step)
    return None if found is None else (max(found[0], 0.0), min(found[1], 1.0))


def choose_rate(validation: np.ndarray) -> int:
    """Return the index of the learning rate at which a placement is judged: the best mean of validation accuracies (rates,
    repeats).

    Samples that are neither trained nor tested on choose one rate for all repeats. To choose for each repeat by the others
    alone looks fairer and is not: a repeat that did well makes its rate the choice of all others but not its own, so that
    accuracies which share a choice depend on each other, and differences are claimed where there are none (docs/compare.md).

    Example:
        >>> choose_rate(np.array([[0.8, 0.8, 0.8], [0.95, 0.7, 0.7]]))
        0
    """
    return int(validation.mean(axis=1).round(9).argmax())  # sums in other orders differ in their last bits; ties: the first


def pair_confidence(pairs: int, look: int | None = None) -> float:
    """Return the confidence that each of so many intervals needs for all to hold with 95 % (Bonferroni), at one look of a
    study.

    Example:
        >>> round(pair_confidence(6), 4), round(pair_confidence(6, look=20), 4)
        (0.9917, 0.9975)
    """
    return 1 - (1 - CONFIDENCE) * (1.0 if look is None else share(look)) / max(1, pairs)


def differences(scores: dict[str, np.ndarray], step: float, margin: float = 0.0) -> list[Difference]:
    """Compare every pair of placements: the difference of their mean scores and its interval, the largest difference first.

    Bonferroni's correction: with m pairs each interval has confidence 1 - 0.05 / m, so that all hold together with 95 %.

    Args:
        scores: accuracies (repeats,) of each placement; equal positions share their seed.
        step: accuracy that one test sample is worth. The spread between repeats is never taken for less: repeats that
            happen to agree in the count of a small test set do not prove that others would.
        margin: a difference below counts as none.

    Example:
        >>> [found] = differences({"none": np.array([0.80, 0.82, 0.81]), "before": np.array([0.90, 0.91, 0.92])}, 0.001)
        >>> found.better, round(found.difference, 2), round(found.low, 3), round(found.high, 3), found.shown
        ('before', 0.1, 0.075, 0.125, True)
    """
    pairs = list(combinations(scores, 2))
    found = [compared(*pair, scores, step, pair_confidence(len(pairs)), margin) for pair in pairs]
    return sorted(found, key=lambda pair: -pair.difference)


def compared(
    first: str,
    second: str,
    scores: dict[str, np.ndarray],
    step: float,
    confidence: float,
    margin: float = 0.0,
    pairs: int | None = None,
    most: float = 1.0,
) -> Difference:
    """Compare one pair of placements, with an interval of the given confidence.

    Args:
        first, second: names in `scores`.
        scores, step, margin: as of `differences`.
        confidence: of the interval.
        pairs: of a study that looks several times: how many pairs it has. Repeats are forecast for its next looks.
        most: what a difference can be at most: 1 for accuracies.

    Example:
        >>> scores = {"none": np.array([0.80, 0.82, 0.81]), "before": np.array([0.80, 0.82, 0.81])}
        >>> compared("none", "before", scores, 0.001, 0.95, margin=0.01).equivalent
        True
    """
    values = scores[first] - scores[second]
    mean, count = float(np.mean(values)), len(values)
    better, worse = (first, second) if mean >= 0 else (second, first)
    mean = abs(mean)
    if count < 2:
        return Difference(better, worse, mean, None, None, False, None, count)
    spread = max(float(np.std(values, ddof=1)), step)
    half = half_width(spread, count, confidence)
    low, high, shown = max(mean - half, -most), min(mean + half, most), mean > half
    needed = None if shown else _forecast(mean, spread, count, confidence, pairs)
    return Difference(better, worse, mean, low, high, shown, needed, count, max(high, -low) < margin)


def _forecast(mean: float, spread: float, count: int, confidence: float, pairs: int | None) -> int | None:
    if pairs is None:
        return repeats_needed(mean, spread, confidence, at_least=count + 1)
    looks = [look for look in LOOKS if look > count]
    return _enough(mean, spread, looks, [pair_confidence(pairs, look) for look in looks])


def repeats_needed(difference: float, spread: float, confidence: float = CONFIDENCE, at_least: int = 2) -> int | None:
    """Return the paired repeats whose interval would exclude 0 with a chance of 80 %; None for more than 1000.

    Args:
        difference, spread: mean and standard deviation of the paired differences.

    Source: the usual approximation n >= ((t_confidence + t_power) * spread / difference)^2, t with n - 1 degrees of freedom.

    Example:
        >>> repeats_needed(1.0, 1.0)
        10
    """
    repeats = range(max(2, at_least), MOST_REPEATS + 1)
    return _enough(difference, spread, repeats, [confidence] * len(repeats))


def _enough(difference: float, spread: float, repeats: Sequence[int], confidences: Sequence[float]) -> int | None:
    if not len(repeats):
        return None
    enough = difference * np.sqrt(np.array(repeats)) >= _quantiles(tuple(repeats), tuple(confidences)) * spread
    return int(repeats[int(enough.argmax())]) if enough.any() else None


@lru_cache(maxsize=100)
def _quantiles(repeats: tuple[int, ...], confidences: tuple[float, ...]) -> np.ndarray:
    from scipy import stats

    degrees = np.array(repeats) - 1
    return np.asarray(stats.t.ppf((1 + np.array(confidences)) / 2, degrees) + stats.t.ppf(POWER, degrees))


def half_width(spread: float, count: int, confidence: float) -> float:
    """Return how far Student's interval of a mean reaches to each side.

    Example:
        >>> round(half_width(0.1, 3, 0.95), 4)
        0.2484
    """
    return quantile(confidence, count - 1) * spread / count**0.5
