"""The reference kernel: the mathematics of `core` itself, on any array namespace and any device.

It defines what every other kernel must compute. Views are (groups, outer, channel, inner) of any float dtype; gamma, beta,
moments and their derivatives are float32, or float64 where x is. Half precision is widened on the way in and rounded once on
the way out.
"""

from __future__ import annotations

from evennorm.core.moments import Moments, moments
from evennorm.core.namespace import Array, Namespace
from evennorm.core.normalize import Gradients, gradients, normalize

NAME = "reference"


def wide(xp: Namespace, x: Array) -> Array:
    """`x` in the precision that it is computed in: float64 stays, everything else becomes float32."""
    return x if xp.dtype(x) == xp.float64 else xp.astype(x, xp.float32)


def forward(
    xp: Namespace,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    mask: Array | None,
    epsilon: float,
    negative_slope: float,
) -> tuple[Array, Moments]:
    """Training: the moments of `x`, and `x` normalized by them in x's dtype."""
    statistics = moments(xp, wide(xp, x), mask)
    return inference(xp, x, statistics, gamma, beta, residual, epsilon, negative_slope), statistics


def inference(
    xp: Namespace,
    x: Array,
    statistics: Moments,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    epsilon: float,
    negative_slope: float,
) -> Array:
    """`x` normalized by given statistics, in x's dtype."""
    wide_residual = None if residual is None else wide(xp, residual)
    y = normalize(xp, wide(xp, x), statistics, gamma, beta, epsilon, negative_slope, wide_residual)
    return xp.astype(y, xp.dtype(x))


def backward(
    xp: Namespace,
    dy: Array,
    x: Array,
    statistics: Moments,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    mask: Array | None,
    epsilon: float,
    negative_slope: float,
    d_mean: Array | None = None,
    d_variance: Array | None = None,
) -> Gradients:
    """The derivatives of `forward`, those of x and residual in their dtypes."""
    wide_residual = None if residual is None else wide(xp, residual)
    g = gradients(
        xp,
        wide(xp, dy),
        wide(xp, x),
        statistics,
        gamma,
        beta,
        epsilon,
        negative_slope,
        wide_residual,
        mask,
        d_mean,
        d_variance,
    )
    d_residual = None if residual is None else xp.astype(g.residual, xp.dtype(residual))
    return Gradients(xp.astype(g.x, xp.dtype(x)), g.gamma, g.beta, d_residual)
