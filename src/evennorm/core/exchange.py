"""Combine the statistics of every device's part of a batch into those of the whole, the same on all devices.

Each device packs its moments into one row, all devices gather all rows, and each merges them in the order of the devices:
one exchange, and the same bits everywhere. Backward, the two sums of `normalize.gradient_sums` are added over devices.
"""

from __future__ import annotations

from evennorm.core.moments import Moments
from evennorm.core.namespace import Array, Namespace


def packed(xp: Namespace, local: Moments) -> Array:
    """Return the moments of one device as a row of numbers: 3 per channel, and the count of each group.

    Behind a mask that hides different values of different channels, each channel has a count of its own.
    """
    count = xp.asarray(local.count, like=local.mean)
    groups, channel = xp.shape(local.mean)
    width = channel if len(xp.shape(count)) == 2 and xp.shape(count)[1] == channel else 1
    count = xp.broadcast_to(count, (groups, width))
    return xp.reshape(xp.concatenate([local.mean, local.mean_low, local.variance, count], 1), (-1,))


def merged(xp: Namespace, rows: Array, groups: int, channel: int) -> Moments:
    """Return the moments of all devices together, from the rows (device, ...) that `packed` gave on each.

        n = sum n_i;   delta_i = mean_i - shift;   mean = shift + sum n_i delta_i / n
        variance = sum n_i (variance_i + delta_i^2) / n - (mean - shift)^2

    The shift is the mean rounded to a float, so that the last subtraction takes away next to nothing. Devices without values
    weigh nothing; one statistic that is not finite makes that of the whole so, on every device. Chan, Golub & LeVeque 1983.
    """
    devices = xp.shape(rows)[0]
    rows = xp.reshape(rows, (devices, groups, -1))
    mean, mean_low, variance = (rows[:, :, i * channel : (i + 1) * channel] for i in range(3))
    dtype, counts = xp.dtype(rows), xp.astype(rows[:, :, 3 * channel :], xp.widest)
    count = xp.sum(counts, (0,))
    share = counts / xp.maximum(count, 1.0)
    shift = xp.rounded(xp.astype(xp.sum(share * xp.astype(mean, xp.widest), (0,)), dtype))
    delta = xp.astype(mean, xp.widest) - xp.astype(shift, xp.widest) + xp.astype(mean_low, xp.widest)
    rest = xp.sum(share * delta, (0,))
    variance = xp.sum(share * (xp.astype(variance, xp.widest) + delta * delta), (0,)) - rest * rest
    return Moments(xp.astype(count, dtype), shift, xp.astype(rest, dtype), xp.astype(xp.maximum(variance, 0.0), dtype))


def local_derivatives(
    xp: Namespace, local: Moments, whole: Moments, d_mean: Array, d_variance: Array
) -> tuple[Array, Array]:
    """Return the derivatives by one device's `mean_low` and variance, from those by the whole batch's, added over all
    devices.

    d mean_i = n_i / n * (d mean + 2 (mean_i - mean) d variance);   d variance_i = n_i / n * d variance
    """
    share, delta = _share(xp, local, whole)
    return share * (d_mean + 2.0 * delta * d_variance), share * d_variance


def local_tangents(xp: Namespace, local: Moments, whole: Moments, t_mean: Array, t_variance: Array) -> tuple[Array, Array]:
    """Return what one device's tangents of `mean_low` and variance contribute to those of the whole batch, in a sum over all
    devices."""
    share, delta = _share(xp, local, whole)
    return share * t_mean, share * (t_variance + 2.0 * delta * t_mean)


def _share(xp: Namespace, local: Moments, whole: Moments) -> tuple[Array, Array]:
    """Return this device's share of all values, and the distance of its mean from that of the whole batch."""
    share = xp.asarray(local.count, like=whole.mean) / xp.maximum(xp.asarray(whole.count, like=whole.mean), 1.0)
    return share, (local.mean - whole.mean) + (local.mean_low - whole.mean_low)
