"""Compute the gradient of `batch_norm` by its own formula, since NumPy has no automatic differentiation."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from evennorm.core.call import Call, refuse_complex
from evennorm.core.moments import Moments
from evennorm.core.normalize import Gradients
from evennorm.errors import ArgumentError, ShapeError
from evennorm.kernels import reference
from evennorm.numpy import cpu
from evennorm.numpy.arrays import floats, parameter, wide
from evennorm.numpy.functional import engine, supports
from evennorm.numpy.namespace import xp

__all__ = ["batch_norm_gradient"]


def batch_norm_gradient(
    dy: np.ndarray,
    x: np.ndarray,
    moments: Moments,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    *,
    axis: int | Iterable[int] = -1,
    epsilon: float = 1e-5,
    mask: np.ndarray | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: np.ndarray | None = None,
    virtual_batch_size: int | None = None,
    d_mean: np.ndarray | None = None,
    d_variance: np.ndarray | None = None,
) -> Gradients:
    """Compute the derivatives of a loss by the inputs of `batch_norm`, from its derivative `dy` by y.

        dz = dy * activation'(z);   dbeta = sum dz;   dgamma = sum dz * xhat;   dresidual = dz
        dx = gamma / sqrt(variance + epsilon) * (dz - dbeta / n - xhat * dgamma / n)

    Args:
        dy: an array of x's shape.
        x, gamma, beta, axis, epsilon, mask, activation, negative_slope, residual, virtual_batch_size: as in `batch_norm`.
        moments: what `batch_norm` returned.
        d_mean, d_variance: derivatives by the moments themselves, of their shape, where the loss looks at them, too.

    Returns:
        `Gradients` x, gamma, beta, residual, each of its input's shape; None where the input was None. Those of x and
        residual have x's dtype, those of gamma and beta are float64 for float64, else float32.

    Raises:
        ShapeError: an array does not fit x.
        ArgumentError: as in `batch_norm`; moments of another number of values than x has.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.

    Example:
        >>> import numpy as np
        >>> from evennorm.numpy import batch_norm, batch_norm_gradient
        >>> x, gamma = np.array([[1.0], [2.0], [6.0]]), np.array([2.0])
        >>> y, moments = batch_norm(x, gamma)
        >>> g = batch_norm_gradient(np.array([[1.0], [0.0], [0.0]]), x, moments, gamma)
        >>> g.x.round(4).ravel(), g.gamma.round(4), g.beta
        (array([ 0.3527, -0.4409,  0.0882]), array([-0.9258]), None)
    """
    refuse_complex(gamma=gamma, beta=beta, d_mean=d_mean, d_variance=d_variance)
    x = floats("x", x)
    call = engine._call(x, axis, epsilon, activation, negative_slope, virtual_batch_size)
    geometry, dtype = call.geometry, wide(x)
    dy = _like("dy", dy, x)
    residual = None if residual is None else _like("residual", residual, x)
    gamma, beta = (engine._flat(parameter(value, dtype), geometry) for value in (gamma, beta))
    groups = 1 if virtual_batch_size is None else geometry._groups(x.shape[0], virtual_batch_size)
    shape = geometry.parameter_shape if virtual_batch_size is None else (groups, *geometry.parameter_shape)

    def flat(name: str, statistic: Any, as_dtype: np.dtype | None = None) -> Any:
        if statistic is None:
            return None
        array = np.asarray(statistic, as_dtype, order="C")
        if array.shape != shape:
            raise ShapeError(f"{name} has the shape of batch_norm's moments, {shape}; received shape {array.shape}")
        return array.reshape(groups, geometry.channel)

    mean, mean_low = flat("moments.mean", moments.mean), flat("moments.mean_low", moments.mean_low)
    variance = flat("moments.variance", moments.variance, dtype)
    if mean_low is None or mean.dtype != dtype or mean_low.dtype != dtype:
        mean, mean_low = _near(dtype, mean, mean_low)
    number = _checked_count(moments.count, groups, call.count(x.shape), mask)
    used = Moments(number, mean, mean_low, variance)
    d_mean, d_variance = flat("d_mean", d_mean, dtype), flat("d_variance", d_variance, dtype)
    compiled = supports(call, x, mask) and not call.gradient_needs_formulas
    run = cpu.gradient if compiled else partial(_reference, mask)
    g = run(call, dy, x, used, gamma, beta, residual, d_mean, d_variance)
    d_gamma, d_beta = (None if a is None else a.reshape(geometry.parameter_shape) for a in (g.gamma, g.beta))
    return Gradients(g.x, d_gamma, d_beta, g.residual)


@np.errstate(invalid="ignore")
def _reference(
    mask: Any,
    call: Call,
    dy: np.ndarray,
    x: np.ndarray,
    moments: Moments,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    residual: np.ndarray | None,
    d_mean: np.ndarray | None,
    d_variance: np.ndarray | None,
) -> Gradients:
    geometry, group_size = call.geometry, call.group_size
    dy_view, x_view, residual_view = (None if a is None else geometry.view(xp, a, group_size) for a in (dy, x, residual))
    hidden = None if mask is None else geometry.mask_view(xp, xp.boolean(mask), x.shape, group_size)
    g = reference.backward(xp, call, dy_view, x_view, moments, gamma, beta, residual_view, hidden, d_mean, d_variance)
    dx, d_residual = (None if a is None else geometry.restore(xp, a, x.shape) for a in (g.x, g.residual))
    return Gradients(dx, g.gamma, g.beta, d_residual)


def _like(name: str, value: Any, x: np.ndarray) -> np.ndarray:
    array = floats(name, value)
    if array.shape != x.shape:
        raise ShapeError(f"{name} has the shape of x, {x.shape}; received shape {array.shape}")
    return array.astype(x.dtype, copy=False)


def _near(dtype: np.dtype, mean: np.ndarray, mean_low: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Split a mean into one in the precision of x, and the rest."""
    near = mean.astype(dtype)
    return near, ((mean.astype(np.float64) - near) + (0.0 if mean_low is None else mean_low)).astype(dtype)


def _checked_count(given: Any, groups: int, values: int, mask: Any) -> Any:
    """Return the count in the form of the reference: an int, or (groups, 1 or channel)."""
    if mask is not None:
        return np.asarray(given).reshape(groups, -1)
    if not (isinstance(given, int) and given == values) and np.any(np.asarray(given) != values):
        raise ArgumentError(
            f"moments are what batch_norm returned for this x, of {values} values per channel; received a count of {given}"
        )
    return values
