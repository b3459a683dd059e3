"""Normalize a view by its moments, and compute the gradient.

y = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta [+ residual])

All arrays are views (groups, outer, channel, inner); gamma and beta are (channel,) or None; moments are (groups, channel).
`core.activation` has the activation.
Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1 and section 3.
"""

from __future__ import annotations

from typing import NamedTuple

from evennorm.core.activation import LINEAR, Activation, activate, gated_by, is_closed
from evennorm.core.moments import Moments, per_channel
from evennorm.core.namespace import Array, Namespace
from evennorm.core.summation import channel_sum


class Gradients(NamedTuple):
    """Derivatives of the loss by the inputs of `normalize`; None where the input was None."""

    x: Array
    gamma: Array | None
    beta: Array | None
    residual: Array | None


def normalize(
    xp: Namespace,
    x: Array,
    moments: Moments,
    gamma: Array | None,
    beta: Array | None,
    epsilon: float,
    activation: Activation = LINEAR,
    residual: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Compute y by the formula above, as (x - mean) * scale + shift: centred, so that a large mean does not cancel.

    `mask` changes no value. An engine that differentiates these operations itself gives it, so that a NaN which it hides
    acts on no derivative, as in `gradients`.
    """
    z = _linear(xp, x, moments, gamma, beta, epsilon, residual)
    if mask is not None:
        acts = mask | xp.isfinite(x)
        quiet = _linear(xp, without(xp, x, acts, moments), moments, gamma, beta, epsilon, residual)
        z = xp.where(acts, quiet, xp.stop_gradient(z))
    return activate(xp, z, activation)


def normalize_by(
    xp: Namespace,
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None,
    beta: Array | None,
    epsilon: float,
    activation: Activation = LINEAR,
    residual: Array | None = None,
) -> Array:
    """Normalize by statistics that do not come from x. All arrays but x have a shape that broadcasts against it.

    So nothing asks for a size of x: programs that are written for other machines hold arithmetic alone, which converters
    fold into the layer before.
    """
    deviation = xp.sqrt(variance + epsilon)
    z = (x - mean) / deviation if gamma is None else (x - mean) * (gamma / deviation)
    z = z if beta is None else z + beta
    return activate(xp, z if residual is None else z + residual, activation)


def gradients(
    xp: Namespace,
    dy: Array,
    x: Array,
    moments: Moments,
    gamma: Array | None,
    beta: Array | None,
    epsilon: float,
    activation: Activation = LINEAR,
    residual: Array | None = None,
    mask: Array | None = None,
    d_mean: Array | None = None,
    d_variance: Array | None = None,
) -> Gradients:
    """Compute the derivatives through `normalize` and through the `moments` of x itself.

        dz = dy * activation'(z);   dbeta = sum dz;   dgamma = sum dz * xhat
        dx = gamma / sqrt(variance + epsilon) * (dz - dbeta / n - xhat * dgamma / n)

    `d_mean` and `d_variance` are derivatives that reach the moments on another way. Masked values do not act on the moments,
    so only the first term of dx holds for them; and those that are not finite, or whose dy is not, act on nothing at all.
    """
    dz, x = dz_of(xp, dy, x, moments, gamma, beta, epsilon, activation, residual, mask)
    sums = gradient_sums(xp, dz, x, moments)
    d_gamma, d_beta = parameter_gradients(xp, *sums, moments, epsilon, gamma is not None, beta is not None)
    dx = input_gradient(xp, dz, x, moments, gamma, epsilon, *sums, mask, d_mean, d_variance)
    return Gradients(dx, d_gamma, d_beta, None if residual is None else dz)


def dz_of(
    xp: Namespace,
    dy: Array,
    x: Array,
    moments: Moments,
    gamma: Array | None,
    beta: Array | None,
    epsilon: float,
    activation: Activation = LINEAR,
    residual: Array | None = None,
    mask: Array | None = None,
) -> tuple[Array, Array]:
    """Return dz, and x for the sums over both: masked values that are not finite, or whose dy is not, change no sum."""
    if mask is not None:  # 0 * NaN is NaN
        acts = acting(xp, mask, x, dy)
        dy, x = xp.where(acts, dy, 0.0), without(xp, x, acts, moments)
    if activation == LINEAR:
        return dy, x
    z = _linear(xp, x, moments, gamma, beta, epsilon, residual)
    return gated_by(xp, dy, is_closed(z, activation), activation), x


def parameter_gradients(
    xp: Namespace,
    sum_dz: Array,
    sum_dz_centred: Array,
    moments: Moments,
    epsilon: float,
    has_gamma: bool,
    has_beta: bool,
) -> tuple[Array | None, Array | None]:
    """Return dgamma and dbeta, (channel,), from the sums that `gradient_sums` gives."""
    d_gamma = xp.sum(sum_dz_centred * _inverse_deviation(xp, moments, epsilon), (0,)) if has_gamma else None
    return d_gamma, xp.sum(sum_dz, (0,)) if has_beta else None


def gradient_sums(xp: Namespace, dz: Array, x: Array, moments: Moments) -> tuple[Array, Array]:
    """Return sum dz and sum dz * (x - mean), each (groups, channel): what devices exchange in the backward pass."""
    dtype = xp.dtype(x)
    sum_dz = channel_sum(xp, dz)
    sum_dz_shifted = channel_sum(xp, dz * centred(xp, x, moments))
    sum_dz_centred = sum_dz_shifted - sum_dz * xp.astype(moments.mean_low, xp.widest)
    return xp.astype(sum_dz, dtype), xp.astype(sum_dz_centred, dtype)


def input_gradient(
    xp: Namespace,
    dz: Array,
    x: Array,
    moments: Moments,
    gamma: Array | None,
    epsilon: float,
    sum_dz: Array,
    sum_dz_centred: Array,
    mask: Array | None = None,
    d_mean: Array | None = None,
    d_variance: Array | None = None,
) -> Array:
    """Compute dx = scale * dz - xhat * slope - offset, the last two only where x entered the moments.

    By xhat, not by x - mean: the power of 1 / deviation that this would take is beyond float32 for values of scale 1e13. A
    value that alone counts in its channel is its own mean, and its dz acts on nothing: it is left out, exactly.
    """
    inverse = _inverse_deviation(xp, moments, epsilon)
    scale = _scale(inverse, gamma)
    known = isinstance(moments.count, int)
    n = max(moments.count, 1) if known else xp.maximum(xp.asarray(moments.count, like=x), 1.0)
    slope = sum_dz_centred * inverse / n * scale
    offset = scale * sum_dz / n
    if d_variance is not None:
        deviation = xp.sqrt(moments.variance + epsilon)
        slope = slope - 2 * d_variance / n * xp.where(xp.isfinite(deviation), deviation, 0.0)
    if d_mean is not None:
        offset = offset - d_mean / n
    offset = offset - slope * (moments.mean_low * inverse)
    xhat = centred(xp, x, moments) * per_channel(xp, inverse)
    statistics_part = xhat * per_channel(xp, slope) + per_channel(xp, offset)
    if mask is not None:
        statistics_part = xp.where(mask, statistics_part, 0.0)
    dx = dz * per_channel(xp, scale) - statistics_part
    if known and moments.count > 1:
        return dx
    alone = (dz - per_channel(xp, sum_dz)) * per_channel(xp, scale)
    alone = alone if d_mean is None else alone + per_channel(xp, d_mean)
    if known:
        return alone
    single = per_channel(xp, xp.broadcast_to(n, xp.shape(moments.variance)) <= 1)
    return xp.where(single if mask is None else single & mask, alone, dx)


def fixed_stats_gradients(
    xp: Namespace, moments: Moments, gamma: Array | None, epsilon: float, sum_dz: Array, sum_dz_xhat: Array
) -> tuple[Array, Array, Array]:
    """Compute the derivatives of `normalize` by statistics that do not come from x: the factor of dz in dx, d mean, d
    variance.

    dx = scale * dz;   dmean = -scale * sum dz;   dvariance = -scale / (2 sqrt(variance + epsilon)) * sum dz * xhat
    """
    inverse = _inverse_deviation(xp, moments, epsilon)
    scale = _scale(inverse, gamma)
    return scale, -scale * sum_dz, -0.5 * inverse * sum_dz_xhat * scale


def moments_gradient(
    xp: Namespace, x: Array, moments: Moments, mask: Array | None, d_mean: Array | None, d_variance: Array | None
) -> Array:
    """Compute the derivative by x of its moments alone: (dmean + 2 dvariance (x - mean)) / n where x counts."""
    n = moments.count if isinstance(moments.count, int) else xp.asarray(moments.count, like=x)
    n = max(n, 1) if isinstance(n, int) else xp.maximum(n, 1.0)
    x = x if mask is None else without(xp, x, mask, moments)
    none = 0.0 * moments.mean_low
    d_mean = none if d_mean is None else d_mean / n
    slope = none if d_variance is None else 2.0 * d_variance / n
    dx = centred(xp, x, moments) * per_channel(xp, slope) + per_channel(xp, d_mean - slope * moments.mean_low)
    return dx if mask is None else xp.where(mask, dx, 0.0)


def acting(xp: Namespace, mask: Array, x: Array, dy: Array) -> Array:
    """Return where a view takes part in its gradient: wherever it counts, and where it is masked but x and dy are finite."""
    return mask | (xp.isfinite(x) & xp.isfinite(dy))


def without(xp: Namespace, x: Array, acts: Array, moments: Moments) -> Array:
    """Return `x` with its channel's mean wherever it takes no part in the gradient, so that it changes no sum."""
    return xp.where(acts, x, 0.0 if moments.mean is None else xp.broadcast_to(per_channel(xp, moments.mean), xp.shape(x)))


def centred(xp: Namespace, x: Array, moments: Moments) -> Array:
    """Return x - mean, without the mean's low part; x itself where a kernel has subtracted the mean already and passes
    None."""
    return x if moments.mean is None else x - per_channel(xp, moments.mean)


def _linear(
    xp: Namespace,
    x: Array,
    moments: Moments,
    gamma: Array | None,
    beta: Array | None,
    epsilon: float,
    residual: Array | None,
) -> Array:
    scale = _scale(_inverse_deviation(xp, moments, epsilon), gamma)
    z = centred(xp, x, moments) * per_channel(xp, scale)
    shift = None if moments.mean_low is None else -moments.mean_low * scale
    if beta is not None:
        shift = xp.reshape(beta, (1, -1)) if shift is None else beta + shift
    z = z if shift is None else z + per_channel(xp, shift)
    return z if residual is None else z + residual


def _inverse_deviation(xp: Namespace, moments: Moments, epsilon: float) -> Array:
    return 1.0 / xp.sqrt(moments.variance + epsilon)


def _scale(inverse: Array, gamma: Array | None) -> Array:
    return inverse if gamma is None else inverse * gamma
