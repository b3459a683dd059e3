"""Batch normalization as a textbook writes it, in float64 and one array at a time: what everything else is compared with.

Independent of the package on purpose: no Geometry, no shift, no view.
"""

from __future__ import annotations

import numpy as np

from tests.cases import Case

BENDS = {None: (1.0, np.inf), "relu": (0.0, np.inf), "relu6": (0.0, 6.0), "leaky_relu": (0.01, np.inf)}
"""The slope below zero of each activation, and its largest value."""


def activated(z: np.ndarray, activation: str | None) -> np.ndarray:
    slope, limit = BENDS[activation]
    return np.minimum(np.where(z > 0, z, slope * z), limit)


def derivative(z: np.ndarray, activation: str | None) -> np.ndarray:
    slope, limit = BENDS[activation]
    return np.where(z >= limit, 0.0, np.where(z > 0, 1.0, slope))


def to_a_bend(z: np.ndarray, activation: str | None) -> np.ndarray:
    """How far z is from where the derivative changes, so that its side may be a matter of rounding."""
    slope, limit = BENDS[activation]
    return np.full(z.shape, np.inf) if slope == 1 else np.minimum(np.abs(z), np.abs(z - limit))


def spread(activation: str | None) -> float:
    """A factor for gamma, so that the largest value matters."""
    return 4.0 if activation == "relu6" else 1.0


def statistics(case: Case, x: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, mean and biased variance, broadcastable against x."""
    counts = np.ones(x.shape, bool) if mask is None else case.full_mask(mask)
    values = np.where(counts, x, 0.0)
    count = counts.sum(case.reduced, keepdims=True)
    mean = values.sum(case.reduced, keepdims=True) / np.maximum(count, 1)
    variance = (np.where(counts, x - mean, 0.0) ** 2).sum(case.reduced, keepdims=True) / np.maximum(count, 1)
    return count, mean, variance


def _parameter(case: Case, value: np.ndarray) -> np.ndarray:
    return np.expand_dims(value, case.reduced)


def _groups(case: Case, *arrays: np.ndarray | None) -> list[list[np.ndarray | None]]:
    if case.group is None:
        return [list(arrays)]
    starts = range(0, case.shape[0], case.group)
    return [[None if a is None else a[s : s + case.group] for a in arrays] for s in starts]


def forward(
    case: Case,
    x: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    residual: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    activation: str | None = None,
) -> np.ndarray:
    """y, ghost batch by ghost batch."""
    parts = []
    for xg, rg, mg in _groups(case, x, residual, mask):
        part = Case(case.name, xg.shape, case.axis, epsilon=case.epsilon)
        _, mean, variance = statistics(part, xg, mg)
        z = _parameter(case, gamma) * (xg - mean) / np.sqrt(variance + case.epsilon) + _parameter(case, beta)
        z = z if rg is None else z + rg
        parts.append(activated(z, activation))
    return np.concatenate(parts) if parts else x


def backward(
    case: Case,
    dy: np.ndarray,
    x: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    residual: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    activation: str | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """dx, dgamma, dbeta and dresidual of sum(y * dy), by the chain rule of the paper's section 3."""
    dx, dr, dgamma, dbeta = [], [], np.zeros_like(gamma), np.zeros_like(beta)
    for dyg, xg, rg, mg in _groups(case, dy, x, residual, mask):
        part = Case(case.name, xg.shape, case.axis, epsilon=case.epsilon)
        counts = np.ones(xg.shape, bool) if mg is None else part.full_mask(mg)
        count, mean, variance = statistics(part, xg, mg)
        n = np.maximum(count, 1)
        inverse = 1 / np.sqrt(variance + case.epsilon)
        xhat = (xg - mean) * inverse
        z = _parameter(case, gamma) * xhat + _parameter(case, beta) + (0 if rg is None else rg)
        dz = dyg * derivative(z, activation)
        dxhat = dz * _parameter(case, gamma)
        dvariance = (dxhat * (xg - mean) * -0.5 * inverse**3).sum(case.reduced, keepdims=True)
        dmean = (-dxhat * inverse).sum(case.reduced, keepdims=True)
        through_statistics = dvariance * 2 * (xg - mean) / n + dmean / n
        dx.append(dxhat * inverse + np.where(counts, through_statistics, 0.0))
        dr.append(dz)
        dgamma += (dz * xhat).sum(case.reduced)
        dbeta += dz.sum(case.reduced)
    return np.concatenate(dx), dgamma, dbeta, np.concatenate(dr)
