"""Batch normalization in float64 NumPy as a textbook writes it, for one array: what the layer is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np


class Reference(NamedTuple):
    """Result and statistics; the statistics have the parameter shape."""

    y: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


def reduced_axes(rank: int, axis: int | Iterable[int]) -> tuple[int, ...]:
    kept = {a % rank for a in ([axis] if isinstance(axis, int) else axis)}
    return tuple(a for a in range(rank) if a not in kept)


def parameter_shape(shape: tuple[int, ...], axis: int | Iterable[int]) -> tuple[int, ...]:
    reduced = reduced_axes(len(shape), axis)
    return tuple(size for a, size in enumerate(shape) if a not in reduced)


def train(
    x: Any, gamma: Any = 1.0, beta: Any = 0.0, epsilon: float = 1e-3, axis: int | Iterable[int] = -1, where: Any = True
) -> Reference:
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta; `where` broadcasts against x, true where a value counts."""
    x = np.asarray(x, np.float64)
    reduced = reduced_axes(x.ndim, axis)
    mean = np.mean(x, reduced, where=where, keepdims=True)
    variance = np.var(x, reduced, where=where, keepdims=True)
    y = infer(x, mean, variance, gamma, beta, epsilon, axis)
    shape = parameter_shape(x.shape, axis)
    return Reference(y, mean.reshape(shape), variance.reshape(shape))


def infer(
    x: Any,
    mean: Any,
    variance: Any,
    gamma: Any = 1.0,
    beta: Any = 0.0,
    epsilon: float = 1e-3,
    axis: int | Iterable[int] = -1,
) -> np.ndarray:
    """The same by given statistics."""
    x = np.asarray(x, np.float64)
    reduced = reduced_axes(x.ndim, axis)

    def wide(value: Any) -> np.ndarray:
        value = np.asarray(value, np.float64)
        return value if value.ndim in (0, x.ndim) and len(reduced) else np.expand_dims(value, reduced)

    return wide(gamma) * (x - wide(mean)) / np.sqrt(wide(variance) + epsilon) + wide(beta)


def gradients(
    x: Any, gamma: Any, dy: Any, epsilon: float = 1e-3, axis: int | Iterable[int] = -1, where: Any = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Derivatives of sum(y * dy) by x, gamma and beta, term by term of the paper's section 3."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    reduced = reduced_axes(x.ndim, axis)
    counts = np.broadcast_to(where, x.shape)
    n = counts.sum(reduced, keepdims=True)
    mean = np.mean(x, reduced, where=where, keepdims=True)
    deviation = np.sqrt(np.var(x, reduced, where=where, keepdims=True) + epsilon)
    xhat = (x - mean) / deviation
    dxhat = dy * np.expand_dims(np.asarray(gamma, np.float64), reduced)
    d_variance = (dxhat * (x - mean) * -0.5 / deviation**3).sum(reduced, keepdims=True)
    d_mean = (-dxhat / deviation).sum(reduced, keepdims=True)
    through_statistics = np.where(counts, d_variance * 2 * (x - mean) / n + d_mean / n, 0.0)
    return dxhat / deviation + through_statistics, (dy * xhat).sum(reduced), dy.sum(reduced)
