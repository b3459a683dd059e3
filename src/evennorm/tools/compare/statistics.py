"""Accuracies of paired repeats go in; means, intervals, and the differences that they do or do not show come out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
"""Chance of showing a difference, if it is what it seems to be, that a number of repeats is proposed for."""

MOST_REPEATS = 1000


@dataclass(frozen=True)
class Difference:
    """How much more accurate one placement is than another, over paired repeats.

    `low` and `high` belong to intervals that hold for all pairs of a comparison together with 95 % confidence; None for a
    single repeat. `shown`: the interval excludes 0. `repeats_needed`: with so many the difference would probably be
    shown, were it as large as it seems; None where it is shown, or where more than 1000 were needed.
    """

    better: str
    worse: str
    difference: float
    low: float | None
    high: float | None
    shown: bool
    repeats_needed: int | None


def interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's interval for the mean of independent values; None for fewer than two.

    Example:
        >>> low, high = interval(np.array([0.8, 0.9, 1.0]))
        >>> round(low, 4), round(high, 4)
        (0.6516, 1.1484)
    """
    if len(values) < 2:
        return None
    half = _half_width(float(np.std(values, ddof=1)), len(values), confidence)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def choose_rates(validation: np.ndarray) -> np.ndarray:
    """Index of the learning rate (repeats,) that each repeat is judged at, from validation accuracies (rates, repeats).

    The best of several rates looks better than it is when the runs that chose it are those that judge it. So each repeat is
    judged at the rate that is best in the mean of the *other* repeats, on samples that are neither trained nor tested on.

    Example:
        >>> choose_rates(np.array([[0.8, 0.8, 0.8], [0.95, 0.7, 0.7]])).tolist()
        [0, 1, 1]
    """
    repeats = validation.shape[1]
    if repeats == 1:
        return validation.argmax(axis=0)
    others = (validation.sum(axis=1, keepdims=True) - validation) / (repeats - 1)
    # Sums of equal accuracies in other orders differ in their last bits; ties go to the first rate.
    return others.round(9).argmax(axis=0)


def differences(scores: dict[str, np.ndarray], step: float) -> list[Difference]:
    """Every pair of placements, each with the difference of its mean scores and its interval; the largest first.

    Bonferroni's correction: with m pairs each interval has confidence 1 - 0.05 / m, so that all hold together with 95 %.

    Args:
        scores: accuracies (repeats,) of each placement; equal positions share their seed.
        step: accuracy that one test sample is worth. The spread between repeats is never taken for less: repeats that
            happen to agree in the count of a small test set do not prove that others would.

    Example:
        >>> [found] = differences({"none": np.array([0.80, 0.82, 0.81]), "before": np.array([0.90, 0.91, 0.92])}, 0.001)
        >>> found.better, round(found.difference, 2), round(found.low, 3), round(found.high, 3), found.shown
        ('before', 0.1, 0.075, 0.125, True)
    """
    pairs = list(combinations(scores, 2))
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(pairs))
    found = [_difference(*pair, scores[pair[0]] - scores[pair[1]], step, confidence) for pair in pairs]
    return sorted(found, key=lambda pair: -pair.difference)


def _difference(first: str, second: str, values: np.ndarray, step: float, confidence: float) -> Difference:
    mean = float(np.mean(values))
    better, worse = (first, second) if mean >= 0 else (second, first)
    mean = abs(mean)
    if len(values) < 2:
        return Difference(better, worse, mean, None, None, False, None)
    spread = max(float(np.std(values, ddof=1)), step)
    half = _half_width(spread, len(values), confidence)
    shown = mean > half
    needed = None if shown else repeats_needed(mean, spread, confidence, at_least=len(values) + 1)
    return Difference(better, worse, mean, mean - half, mean + half, shown, needed)


def repeats_needed(difference: float, spread: float, confidence: float = CONFIDENCE, at_least: int = 2) -> int | None:
    """Paired repeats whose interval would exclude 0 with a chance of 80 %; None for more than 1000.

    Args:
        difference, spread: mean and standard deviation of the paired differences.

    Source: the usual approximation n >= ((t_confidence + t_power) * spread / difference)^2, t with n - 1 degrees of freedom.

    Example:
        >>> repeats_needed(1.0, 1.0)
        10
    """
    repeats = np.arange(max(2, at_least), MOST_REPEATS + 1)
    quantiles = stats.t.ppf((1 + confidence) / 2, repeats - 1) + stats.t.ppf(POWER, repeats - 1)
    enough = difference * np.sqrt(repeats) >= quantiles * spread
    return int(repeats[enough.argmax()]) if enough.any() else None


def _half_width(spread: float, count: int, confidence: float) -> float:
    return float(stats.t.ppf((1 + confidence) / 2, count - 1)) * spread / count**0.5
