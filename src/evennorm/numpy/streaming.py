"""Merge the moments of chunks of data into the moments of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import numpy as np

from evennorm.core import moments as core
from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.errors import ArgumentError, ShapeError
from evennorm.kernels import reference
from evennorm.numpy import cpu
from evennorm.numpy.arrays import floats
from evennorm.numpy.functional import engine, supports
from evennorm.numpy.namespace import xp

__all__ = ["merge", "moments"]


def moments(x: np.ndarray, *, axis: int | Iterable[int] = -1, mask: np.ndarray | None = None) -> Moments:
    """Compute count, mean and biased variance of each channel of `x`, without normalizing it.

    Args:
        x, axis, mask: as in `batch_norm`; a memmap is read in place.

    Returns:
        Moments in float64, of the parameter shape. No value at all gives mean and variance 0 with count 0.

    Raises:
        ShapeError: axis or mask do not fit `x`.
        ArgumentError: a dtype that is not a float's.

    Example:
        >>> import numpy as np
        >>> from evennorm.numpy import moments
        >>> found = moments(np.array([[1.0, 10.0], [3.0, 10.0]]))
        >>> found.count, found.mean, found.variance
        (2, array([ 2., 10.]), array([1., 0.]))
    """
    x = floats("x", x)
    call = engine._call(x, axis)
    taken = cpu.moments(call, x) if supports(call, x, mask) else _by_reference(call.geometry, x, mask)
    return _wide(engine._of_parameter_shape(taken, call))


@np.errstate(invalid="ignore")
def _by_reference(geometry: Geometry, x: np.ndarray, mask: Any) -> Moments:
    counted = None if mask is None else geometry.mask_view(xp, xp.boolean(mask), x.shape)
    return core.moments(xp, reference.wide(xp, geometry.view(xp, x)), counted)


def merge(parts: Iterable[Moments]) -> Moments:
    """Merge the Moments of several sets of values, such as the chunks of data that is larger than memory.

    Of a generator only one element is held at a time. Sets may differ in size, and be empty.

    Args:
        parts: Moments of one parameter shape, from `moments` or `batch_norm`.

    Returns:
        Moments in float64: what `moments` finds for all values at once, to rounding.

    Raises:
        ArgumentError: no Moments at all.
        ShapeError: they are of different channels.

    Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", equation 2.1.

    Example:
        >>> import numpy as np
        >>> from evennorm.numpy import merge, moments
        >>> chunks = [np.array([[1.0], [3.0]]), np.array([[8.0]])]
        >>> found = merge(moments(chunk) for chunk in chunks)
        >>> found.count, found.mean, found.variance.round(4)
        (3, array([4.]), array([8.6667]))
    """
    rule = "merge takes Moments one by one, such as [a, b] or (moments(chunk) for chunk in chunks)"
    if isinstance(parts, Moments):
        raise ArgumentError(f"{rule}; received a single one, which is merged already")
    found = reduce(_merged, map(_wide, parts), None)
    if found is None:
        raise ArgumentError(f"{rule}; received none; what has no values has no mean")
    return found


def _merged(a: Moments | None, b: Moments) -> Moments:
    if a is None:
        return b
    if a.mean.shape != b.mean.shape:
        raise ShapeError(
            f"merged moments are of the same channels; received means of shape {a.mean.shape} and {b.mean.shape}"
        )
    with np.errstate(invalid="ignore"):  # of infinite means; what comes of them shows
        return _wide(core.merge(xp, a, b))


def _wide(m: Moments) -> Moments:
    """Return moments in float64: the mean as the nearest number, and the rest."""
    mean, low, variance = (np.asarray(0.0 if part is None else part, np.float64) for part in m[1:])
    near = mean + low
    with np.errstate(invalid="ignore"):
        return Moments(_whole(m.count), near, np.where(np.isfinite(near), low - (near - mean), 0.0), variance)


def _whole(count: Any) -> Any:
    return count if isinstance(count, int) else np.asarray(count, np.int64)
