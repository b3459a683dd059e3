"""Compute count, mean and variance of each channel of a view (groups, outer, channel, inner), ready to be merged."""

from __future__ import annotations

from math import inf, prod
from typing import Any, NamedTuple

from evennorm.core.namespace import Array, Namespace
from evennorm.core.summation import channel_sum


class Moments(NamedTuple):
    """Count, mean and biased variance of each channel, of shape (groups, channel).

    The mean is kept as two floats, `mean + mean_low`, because one float32 cannot tell 100000.001 from 100000: a
    normalization to one part in a million needs the rest. `mean_low` carries the derivative, `mean` is a constant.
    Statistics that are given, not taken, have None for `mean_low`.
    """

    count: Any
    """Number of values behind each mean: an int where known, else an array that broadcasts against the mean."""
    mean: Array
    mean_low: Array
    variance: Array

    def __repr__(self) -> str:
        """Return one line whatever the number of channels: few values as they are, of many the shape and dtype.

        Example:
            >>> import evennorm
            >>> evennorm.numpy.moments([[1.0, 2.0], [3.0, 4.0]])
            Moments(count=2, mean=[2. 3.], mean_low=[0. 0.], variance=[1. 1.])
        """
        return f"Moments({', '.join(f'{name}={_shortly(value)}' for name, value in zip(self._fields, self, strict=True))})"


_SHOWN = 4
"""Number of values up to which an array is shown as it is."""


def _shortly(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is None or shape == ():
        return str(value)
    known = all(isinstance(size, int) for size in shape) and prod(shape) <= _SHOWN
    text = str(value) if known else ""
    return text if text and "\n" not in text else f"<{value.dtype} of shape {tuple(shape)}>"


def moments(xp: Namespace, x: Array, mask: Array | None = None) -> Moments:
    """Return the moments of `x`, a float32 or float64 view (groups, outer, channel, inner), by two shifted passes.

        shift = fl(sum(x) / n);   d = x - shift
        mean = shift + sum(d) / n;   variance = sum(d^2) / n - (sum(d) / n)^2

    With the shift this close to the mean, `x - shift` is exact wherever the mean is large (Sterbenz) and the last
    subtraction takes away next to nothing. Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".

    `mask`, of shape (groups, outer, 1 or channel, inner), is true where a value counts; the others may be anything, NaN too.
    No value at all gives mean and variance 0 with count 0.
    """
    count = count_of(xp, x, mask)
    divisor = max(count, 1) if isinstance(count, int) else xp.maximum(xp.astype(count, xp.widest), 1.0)

    def counted(values: Array) -> Array:
        return values if mask is None else xp.where(mask, values, 0.0)

    def mean_of(values: Array) -> Array:
        return channel_sum(xp, values) / divisor

    dtype = xp.dtype(x)
    shift = xp.rounded(xp.stop_gradient(xp.astype(mean_of(counted(x)), dtype)))
    shifted = counted(x - per_channel(xp, shift))
    rest = mean_of(shifted)
    variance = xp.maximum(mean_of(shifted * shifted) - rest * rest, 0.0)
    return Moments(count, shift, xp.astype(rest, dtype), xp.astype(variance, dtype))


OUT_OF_RANGE = (
    "the variance of a channel is beyond the range of {dtype}, though its values are not: y is beta there, and the gradient "
    "0; divide the input by a power of two first, which changes nothing else"
)
"""The text of the warning, given by backends that see the values."""


def out_of_range(mean: Any, variance: Any) -> bool:
    """Return whether these NumPy arrays hold an infinite variance of finite values."""
    return bool((abs(mean[variance == inf]) < inf).any())


def count_of(xp: Namespace, x: Array, mask: Array | None) -> Any:
    """Return the number of values of the view `x` behind each mean: an int where known; with a mask, an array (groups,
    .)."""
    if mask is not None:
        return xp.astype(channel_sum(xp, xp.astype(mask, xp.dtype(x))), xp.dtype(x))
    _, outer, _, inner = xp.shape(x)
    return outer * inner


def merge(xp: Namespace, a: Moments, b: Moments) -> Moments:
    """Return the moments of the union of two sets of values, which may be empty (Chan et al., equation 2.1)."""
    count = a.count + b.count
    share = xp.asarray(b.count / (max(count, 1) if isinstance(count, int) else xp.maximum(count, 1.0)), like=a.mean)
    delta = (b.mean - a.mean) + (b.mean_low - a.mean_low)
    variance = a.variance + share * (b.variance - a.variance) + delta * delta * share * (1 - share)
    return Moments(count, a.mean, a.mean_low + delta * share, variance)


def per_channel(xp: Namespace, statistic: Array) -> Array:
    """Reshape (groups, channel) to (groups, 1, channel, 1), to broadcast against a view."""
    groups, channel = xp.shape(statistic)
    return xp.reshape(statistic, (groups, 1, channel, 1))
