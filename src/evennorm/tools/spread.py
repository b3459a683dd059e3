"""Give the interval in which a median of measured times lies, and say whether two of them can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb, exp, fsum, log
from statistics import median

CONFIDENCE = 0.95
FEWEST = 6
"""Samples of which the smallest and the largest enclose the median with that confidence."""


@dataclass(frozen=True)
class Median:
    """A median, and the interval that holds the true one with 95 % confidence; None for fewer than 6 samples."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, samples: Sequence[float]) -> Median:
        """Compute the median and its interval by order statistics, whatever the distribution: times are skewed, with a few
        outliers.

        Source: the sign test; the number of samples below the median is binomial.

        Example:
            >>> Median.of([1, 2, 3, 4, 5, 90])
            Median(value=3.5, low=1, high=90)
            >>> Median.of([1, 2]).low is None
            True
        """
        ordered, n = sorted(samples), len(samples)
        outside, below = -1, 0.0
        while outside < (n - 1) // 2 and (below := below + comb(n, outside + 1) / 2**n) <= (1 - CONFIDENCE) / 2:
            outside += 1
        known = outside >= 0
        return cls(median(ordered), *((ordered[outside], ordered[n - 1 - outside]) if known else (None, None)))

    @property
    def is_known(self) -> bool:
        return self.low is not None

    def overlaps(self, other: Median) -> bool:
        """Return whether no difference can be told, as also where a spread is not known."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high

    @property
    def holds_one(self) -> bool:
        """Whether a ratio tells no difference: its interval is known and holds 1."""
        return self.low is not None and self.high is not None and self.low <= 1 <= self.high

    @property
    def inverse(self) -> Median:
        """The inverse of a ratio.

        Example:
            >>> Median(0.5, 0.25, 1.0).inverse
            Median(value=2.0, low=1.0, high=4.0)
        """
        ends = (1 / self.high, 1 / self.low) if self.low and self.high else (None, None)
        return Median(1 / self.value, *ends)

    def text(self, digits: str = ".3g", unit: str = "") -> str:
        """
        Example:
            >>> Median(3.5, 1.0, 90.0).text(unit=" ms")
            '3.5 ms (1 to 90)'
        """
        spread = "" if self.low is None or self.high is None else f" ({self.low:{digits}} to {self.high:{digits}})"
        return f"{self.value:{digits}}{unit}{spread}"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Median:
    """Return how many times as long one takes as the other, from turns in which both were measured.

    Example:
        >>> ratio([2, 4, 6, 8, 10, 12], [1, 2, 3, 4, 5, 6])
        Median(value=2.0, low=2.0, high=2.0)
    """
    return Median.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def ratio_apart(numerators: Sequence[float], denominators: Sequence[float]) -> Median:
    """Return the same for two that were not measured in turns: from the intervals of both medians, and so wider.

    Example:
        >>> ratio_apart([2, 4, 6, 8, 10, 12], [1, 1, 2, 2, 2, 4])
        Median(value=3.5, low=0.5, high=12.0)
    """
    above, below = Median.of(numerators), Median.of(denominators)
    if above.low is None or above.high is None or not below.low or not below.high:
        return Median(above.value / below.value, None, None)
    return Median(above.value / below.value, above.low / below.high, above.high / below.low)


def together(ratios: Sequence[Median]) -> Median:
    """Return the geometric mean of several ratios, between the means of their lower and of their upper ends.

    Wider than need be: all would have to be at the same end at once.

    Example:
        >>> together([Median(1.0, 0.5, 2.0), Median(4.0, 2.0, 8.0)])
        Median(value=2.0, low=1.0, high=4.0)
    """
    lows, highs = ([low for each in ratios if (low := each.low)], [high for each in ratios if (high := each.high)])
    known = len(lows) == len(highs) == len(ratios)
    ends = (_mean(lows), _mean(highs)) if known else (None, None)
    return Median(_mean([each.value for each in ratios]), *ends)


def _mean(values: Sequence[float]) -> float:
    return exp(fsum(map(log, values)) / len(values))


def told(value: float, spread: Median | None, digits: str = ".2f", unit: str = "") -> str:
    """Format a figure for a page: with its interval, or with the words that there is none.

    Example:
        >>> told(2, Median(2, 1.5, 2.5)), told(0.5, None)
        ('2.00 (1.50 to 2.50)', '0.50 (spread unknown)')
    """
    if spread is None or not spread.is_known:
        return f"{value:{digits}}{unit} (spread unknown)"
    return replace(spread, value=value).text(digits, unit)


def percent(share: Median | None) -> str:
    """Format a fraction for a page, in percent.

    Example:
        >>> percent(Median(0.25, 0.2, 0.3)), percent(None)
        ('25 % (20 to 30)', '-')
    """
    if share is None:
        return "-"
    ends = (None, None) if share.low is None or share.high is None else (100 * share.low, 100 * share.high)
    return told(100 * share.value, Median(100 * share.value, *ends), ".0f", " %")
