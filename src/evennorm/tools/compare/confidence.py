"""Divide 5 % of error among looks at a growing number of repeats, so that the intervals of all looks hold together.

A study that looks at its results, and goes on where they show nothing yet, has several chances of a false claim. Lan and
DeMets ("Discrete sequential boundaries for clinical trials", Biometrika 70, 1983) give each look a share of the error that
is fixed beforehand. Here the shares of all looks add up to 1, for however many looks, and each look takes Student's interval
at its share. By Boole's inequality all of them hold together, for as many repeats as one likes: exactly so, for differences
that are normal, with as few as 3 repeats. docs/compare.md has the power beside other designs.
"""

from __future__ import annotations

from functools import cache
from itertools import takewhile

CONFIDENCE = 0.95

LOOKS = (3, 5, 8, 12, 20, 32, 50, 80, 120, 200, 320, 500, 800)
"""Numbers of repeats after which a sequential study looks at its results."""

_SHARES = (0.12, 0.08, 0.12, 0.18, 0.30)  # for the first looks; the rest halves from look to look
DEFAULT_MAX_REPEATS = LOOKS[len(_SHARES) - 1]


def share(repeats: int) -> float:
    """Return the share of the error that the look after this many repeats takes.

    Example:
        >>> [share(repeats) for repeats in (3, 20, 32, 50)]
        [0.12, 0.3, 0.1, 0.05]
        >>> sum(map(share, LOOKS)) < 1
        True
    """
    look = LOOKS.index(repeats)
    return _SHARES[look] if look < len(_SHARES) else round(1 - sum(_SHARES), 9) / 2 ** (look - len(_SHARES) + 1)


def looks_until(repeats: int) -> tuple[int, ...]:
    """Return the looks of a study with at most this many repeats.

    Example:
        >>> looks_until(10)
        (3, 5, 8)
    """
    return tuple(takewhile(lambda look: look <= repeats, LOOKS))


@cache
def quantile(confidence: float, degrees: int) -> float:
    """Return how many standard errors Student's two-sided interval reaches to each side.

    Example:
        >>> round(quantile(0.95, 4), 3)
        2.776
    """
    from scipy import stats

    return float(stats.t.ppf((1 + confidence) / 2, degrees))
