"""Compute batch normalization by the mathematics of `core` itself, on any array namespace and any device.

The reference kernel defines what every other kernel must compute. Views are (groups, outer, channel, inner) of any float
dtype; gamma, beta, moments and their derivatives are float32, or float64 where x is. Half precision is widened on the way in
and rounded once on the way out.
"""

from __future__ import annotations

from evennorm.core.call import Formula
from evennorm.core.moments import Moments, moments
from evennorm.core.namespace import Array, Namespace, wide
from evennorm.core.normalize import Gradients, gradients, normalize

__all__ = ["NAME", "backward", "forward", "infer", "wide"]

NAME = "reference"


def forward(
    xp: Namespace,
    call: Formula,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    mask: Array | None,
) -> tuple[Array, Moments]:
    """Normalize `x` by its own moments, and return these too; y has x's dtype."""
    statistics = moments(xp, wide(xp, x), mask)
    return infer(xp, call, x, statistics, gamma, beta, residual), statistics


def infer(
    xp: Namespace,
    call: Formula,
    x: Array,
    statistics: Moments,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    mask: Array | None = None,
) -> Array:
    """Normalize `x` by given statistics; y has x's dtype. A mask matters only to engines that differentiate this
    themselves."""
    wide_residual = None if residual is None else wide(xp, residual)
    y = normalize(xp, wide(xp, x), statistics, gamma, beta, call.epsilon, call.activation, wide_residual, mask)
    return xp.astype(y, xp.dtype(x))


def backward(
    xp: Namespace,
    call: Formula,
    dy: Array,
    x: Array,
    statistics: Moments,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    mask: Array | None,
    d_mean: Array | None = None,
    d_variance: Array | None = None,
) -> Gradients:
    """Differentiate `forward`; the gradients of x and residual have their dtypes."""
    wide_residual = None if residual is None else wide(xp, residual)
    g = gradients(
        xp,
        wide(xp, dy),
        wide(xp, x),
        statistics,
        gamma,
        beta,
        call.epsilon,
        call.activation,
        wide_residual,
        mask,
        d_mean,
        d_variance,
    )
    d_residual = None if residual is None else xp.astype(g.residual, xp.dtype(residual))
    return Gradients(xp.astype(g.x, xp.dtype(x)), g.gamma, g.beta, d_residual)
