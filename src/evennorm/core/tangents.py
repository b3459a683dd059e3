"""Compute directional derivatives of the normalized view and its moments.

The forward mode of `core.normalize`, whose `gradients` is its transpose.
"""

from __future__ import annotations

from typing import NamedTuple

from evennorm.core.moments import Moments, per_channel
from evennorm.core.namespace import Array, Namespace
from evennorm.core.normalize import gradient_sums, without


class Tangents(NamedTuple):
    """Directional derivatives of z (before the activation), mean and variance; None for the moments if x does not move."""

    z: Array | None
    mean: Array | None
    variance: Array | None


def tangents(
    xp: Namespace,
    x: Array,
    moments: Moments,
    gamma: Array | None,
    epsilon: float,
    tx: Array | None,
    t_gamma: Array | None = None,
    t_beta: Array | None = None,
    mask: Array | None = None,
    given: tuple[Array | None, Array | None] | None = None,
) -> Tangents:
    """Compute how the outputs move where `x`, gamma and beta move by `tx`, `t_gamma` and `t_beta` (None for not at all).

        tmean = sum tx / n;   tvariance = 2 sum(tx * (x - mean)) / n
        tz = scale * (tx - tmean) + (x - mean) * tscale + tbeta,   scale = gamma / sqrt(variance + epsilon)

    Masked values do not act on the moments; those that are not finite do not move at all, so that no derivative of this
    meets them. Statistics that do not come from x move as `given` says, mean and variance.
    """
    acts = None
    if mask is not None:
        acts = mask | xp.isfinite(x)
        x = without(xp, x, acts, moments)
    inverse = 1.0 / xp.sqrt(moments.variance + epsilon)
    scale = inverse if gamma is None else inverse * gamma
    t_mean, t_variance = _moved(xp, x, moments, tx, mask) if given is None else given
    t_scale = None if t_gamma is None else inverse * t_gamma
    t_shift = None if t_beta is None else xp.reshape(t_beta, (1, -1))
    if t_variance is not None:
        narrowing = -0.5 * t_variance * inverse * inverse * scale  # in an order that stays within the range
        t_scale = narrowing if t_scale is None else t_scale + narrowing
    if t_mean is not None:
        t_shift = -scale * t_mean if t_shift is None else t_shift - scale * t_mean
    z = None if tx is None else tx * per_channel(xp, scale)
    if t_scale is not None:
        low = -moments.mean_low * t_scale
        t_shift = low if t_shift is None else t_shift + low
        part = (x - per_channel(xp, moments.mean)) * per_channel(xp, t_scale)
        z = part if z is None else z + part
    if t_shift is not None:
        t_shift = xp.broadcast_to(t_shift, xp.shape(moments.mean))
        z = per_channel(xp, t_shift) if z is None else z + per_channel(xp, t_shift)
    if z is not None and acts is not None:
        z = xp.where(acts, xp.broadcast_to(z, xp.shape(x)), 0.0)
    return Tangents(z, t_mean, t_variance)


def _moved(
    xp: Namespace, x: Array, moments: Moments, tx: Array | None, mask: Array | None
) -> tuple[Array | None, Array | None]:
    """Return how mean and variance move with x."""
    if tx is None:
        return None, None
    counted, centre = tx, x
    if mask is not None:
        counted, centre = xp.where(mask, tx, 0.0), xp.where(mask, x, per_channel(xp, moments.mean))
    sum_tx, sum_tx_centred = gradient_sums(xp, counted, centre, moments)
    n = max(moments.count, 1) if isinstance(moments.count, int) else xp.maximum(xp.asarray(moments.count, like=x), 1.0)
    return sum_tx / n, 2 * sum_tx_centred / n
