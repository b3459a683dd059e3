"""Give the interval in which a median of measured times lies, and say whether two of them can be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
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
        """By order statistics, whatever the distribution is: times are skewed, and a few of them are far off.

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
        """Whether no difference can be told; so too where a spread is not known."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return True
        return self.low <= other.high and other.low <= self.high

    @property
    def holds_one(self) -> bool:
        """Of a ratio: whether no difference can be told, since its interval is known and holds 1."""
        return self.low is not None and self.high is not None and self.low <= 1 <= self.high

    def text(self, digits: str = ".3g", unit: str = "") -> str:
        """
        Example:
            >>> Median(3.5, 1.0, 90.0).text(unit=" ms")
            '3.5 ms (1 to 90)'
        """
        spread = "" if self.low is None or self.high is None else f" ({self.low:{digits}} to {self.high:{digits}})"
        return f"{self.value:{digits}}{unit}{spread}"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Median:
    """How many times as long one takes as the other, by turns in which both were measured.

    Example:
        >>> ratio([2, 4, 6, 8, 10, 12], [1, 2, 3, 4, 5, 6])
        Median(value=2.0, low=2.0, high=2.0)
    """
    return Median.of([a / b for a, b in zip(numerators, denominators, strict=True)])


def ratio_apart(numerators: Sequence[float], denominators: Sequence[float]) -> Median:
    """The same of two that were not measured in turns: by the intervals of both medians, and so wider.

    Example:
        >>> ratio_apart([2, 4, 6, 8, 10, 12], [1, 1, 2, 2, 2, 4])
        Median(value=3.5, low=0.5, high=12.0)
    """
    above, below = Median.of(numerators), Median.of(denominators)
    if above.low is None or above.high is None or not below.low or not below.high:
        return Median(above.value / below.value, None, None)
    return Median(above.value / below.value, above.low / below.high, above.high / below.low)
