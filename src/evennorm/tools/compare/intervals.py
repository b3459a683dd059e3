"""Compute intervals for what one model shows on new samples: for a share of right answers, and for any other metric."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000


def share_interval(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval for a share of which `right` of `count` independent samples were seen.

    Source: Clopper and Pearson, Biometrika 26 (1934), which never covers less than it says.

    Example:
        >>> [round(end, 4) for end in share_interval(95, 100)]
        [0.8872, 0.9836]
    """
    from scipy.stats import binomtest

    found = binomtest(right, count).proportion_ci(0.95, method="exact")
    return float(found.low), float(found.high)


def bootstrap_interval(statistic: Callable[[np.ndarray], float], count: int, seed: int) -> tuple[float, float]:
    """Return the 95 % interval for a statistic of `count` independent samples: percentiles over 1,000 samplings with
    replacement.

    Samplings for which the statistic is no number are left out, such as those without a positive for an area under a curve.

    Source: Efron, *The jackknife, the bootstrap and other resampling plans*, 1982.

    Args:
        statistic: takes indices of samples.
        count: of samples.
        seed: the same one gives the same interval.

    Example:
        >>> errors = np.arange(100) / 100
        >>> low, high = bootstrap_interval(lambda chosen: errors[chosen].mean(), 100, seed=0)
        >>> round(low, 2), round(high, 2)
        (0.44, 0.55)
    """
    random = np.random.default_rng(seed)
    values = np.array([statistic(random.integers(count, size=count)) for _ in range(RESAMPLES)], dtype="float64")
    finite = values[np.isfinite(values)]
    if not finite.size:
        value = float(statistic(np.arange(count)))
        return value, value
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)
