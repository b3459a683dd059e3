"""Compute the gradient of `normalize` from its output instead of its input.

x - mean = (z - beta) / gamma * sqrt(variance + epsilon)

Rota Bulo, Porzi & Kontschieder 2018, "In-place activated BatchNorm", arXiv 1712.02616, section 3. Views and parameters are
those of `core.normalize`.
"""

from __future__ import annotations

from typing import Any

from evennorm.core.moments import Moments, per_channel
from evennorm.core.namespace import Array, Namespace
from evennorm.core.normalize import Gradients, gradients


def gradients_from_output(
    xp: Namespace,
    dz: Array,
    z: Array,
    count: Any,
    variance: Array,
    gamma: Array | None,
    beta: Array | None,
    epsilon: float,
    mask: Array | None = None,
    d_variance: Array | None = None,
) -> Gradients:
    """Compute `core.normalize.gradients` from z, where x was not kept; gamma must not be 0."""
    deviation = xp.sqrt(variance + epsilon)
    scale = deviation if gamma is None else deviation / gamma
    xhat = z if beta is None else z - per_channel(xp, xp.reshape(beta, (1, -1)))
    moments = Moments(count, None, 0 * variance, variance)
    return gradients(xp, dz, xhat * per_channel(xp, scale), moments, gamma, beta, epsilon, mask=mask, d_variance=d_variance)


def least_gamma(xp: Namespace, gamma: Array, beta: Array | None, unit: float, smallest: float) -> Array:
    """Return the least |gamma| of each channel from which half of the digits of xhat can be recovered.

    z is kept with a relative error of `unit`, so that xhat = (z - beta) / gamma, of size 1, is found with an error of about
    |beta / gamma| * unit; it is to stay below sqrt(unit). Values under `smallest` are kept with an absolute error instead.
    """
    size = 0 * gamma if beta is None else xp.maximum(beta, -beta)
    return xp.maximum(size, smallest) * unit**0.5
