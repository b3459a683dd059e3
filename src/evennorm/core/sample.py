"""Normalize each sample on its own, over its last axis: Keras 1's mode 1.

std = sqrt(variance + epsilon);   y = gamma * (x - mean) / (std + epsilon) + beta

Keras 1.2.2, keras/layers/normalization.py: the epsilon really enters twice.
"""

from __future__ import annotations

from evennorm.core.geometry import Geometry
from evennorm.core.moments import moments, per_channel
from evennorm.core.namespace import Array, Namespace


def normalize_samples(
    xp: Namespace, x: Array, gamma: Array | None, beta: Array | None, epsilon: float, geometry: Geometry
) -> Array:
    """Normalize `x` of any rank, float32 or float64; gamma and beta have the size of its last axis, `geometry.axis`, or are
    None."""
    sizes = xp.shape(x)
    view = geometry.view(xp, x)
    _, rows, features, _ = xp.shape(view)
    samples = xp.reshape(view, (1, 1, rows, features))
    m = moments(xp, samples)
    deviation = xp.sqrt(m.variance + epsilon) + epsilon
    centred = (samples - per_channel(xp, m.mean)) - per_channel(xp, m.mean_low)
    y = geometry.restore(xp, centred / per_channel(xp, deviation), sizes)
    if gamma is not None:
        y = y * gamma
    return y if beta is None else y + beta
