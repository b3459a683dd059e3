"""Translate the fourth weight of an old batch normalization to the variance that gives the same outputs."""

from __future__ import annotations

import numpy as np

from evennorm.tools.migrate.provenance import Fourth, Provenance, UnsaidError


def variance(fourth: np.ndarray, epsilon: float, meaning: Fourth) -> np.ndarray:
    """Return v with sqrt(v + epsilon) equal to what the old layer divided by, in float64.

    Example:
        >>> variance(np.array([2.0]), 0.5, Fourth.STANDARD_DEVIATION)
        array([5.75])
    """
    values = np.asarray(fourth, np.float64)
    if meaning is Fourth.VARIANCE:
        return values
    divisor = values + epsilon if meaning is Fourth.STANDARD_DEVIATION else np.sqrt(values) + epsilon
    return divisor**2 - epsilon


def meaning_of(name: str, fourth: np.ndarray, epsilon: float, origin: Provenance) -> Fourth:
    """Return the meaning of the fourth weight of the layer `name`.

    Raises:
        UnsaidError: several meanings are left, and they give different outputs.
    """
    left = origin.fourth()
    if len(left) > 1:
        # The meaning shows only in the divisor; statistics that no batch has updated are 1 in any case.
        divisors = [np.sqrt(variance(fourth, epsilon, meaning) + epsilon) for meaning in left]
        if all(np.allclose(divisors[0], other, rtol=1e-6, atol=0) for other in divisors):
            return Fourth.VARIANCE
        raise UnsaidError(
            f"the fourth weight of {name!r} may be {'; or '.join(sorted(x.value for x in left))}, and the file does not "
            f"tell which ({origin.text()})",
            "release",
            "say who wrote it, as in --written-by keras==1.0.4,theano",
        )
    return next(iter(left))
