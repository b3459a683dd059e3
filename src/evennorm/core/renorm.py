"""Compute the correction of batch renormalization, which ties a batch to the running statistics.

y = (xhat * r + d) * gamma + beta

Ioffe 2017, arXiv 1702.03275, algorithm 1, with Keras's sigma = sqrt(variance + epsilon).
"""

from __future__ import annotations

from collections.abc import Mapping

from evennorm.core.namespace import Array, Namespace
from evennorm.core.running import Batch


def stddev(xp: Namespace, batch: Batch, epsilon: float) -> Array:
    """Return sigma of a batch, (channel,)."""
    return xp.sqrt(batch.variance + epsilon)


def correction(
    xp: Namespace,
    batch: Batch,
    renorm_mean: Array,
    renorm_stddev: Array,
    epsilon: float,
    clipping: Mapping[str, float | None],
) -> tuple[Array, Array]:
    """Return r and d, (channel,), constants for the derivative.

    r = clip(sigma_batch / sigma, rmin, rmax);   d = clip((mean_batch - mean) / sigma, -dmax, dmax)
    """
    sigma = xp.maximum(renorm_stddev, epsilon**0.5)
    r = stddev(xp, batch, epsilon) / sigma
    d = ((batch.mean - renorm_mean) + batch.mean_low) / sigma
    rmin, rmax, dmax = (clipping.get(key) for key in ("rmin", "rmax", "dmax"))
    if rmin is not None:
        r = xp.maximum(r, rmin)
    if rmax is not None:
        r = xp.minimum(r, rmax)
    if dmax is not None:
        d = xp.minimum(xp.maximum(d, -dmax), dmax)
    return xp.stop_gradient(r), xp.stop_gradient(d)


def effective_parameters(gamma: Array | None, beta: Array | None, r: Array, d: Array) -> tuple[Array, Array]:
    """Return the gamma and beta that give y from the plain xhat: r * gamma and d * gamma + beta."""
    scale, offset = (r, d) if gamma is None else (r * gamma, d * gamma)
    return scale, offset if beta is None else offset + beta


def variance(xp: Namespace, sigma: Array, epsilon: float) -> Array:
    """Return the variance of a running sigma, 0 where rounding took it below."""
    return xp.maximum(sigma * sigma - epsilon, 0.0)
