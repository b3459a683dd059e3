"""Define the contestants on NumPy: our function and its gradient, the formulas as one writes them, copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import (
    CHEAP_COPY,
    COPY,
    EPSILON,
    LIMIT,
    OURS,
    Calls,
    Contestant,
    Data,
    NotServed,
)
from evennorm.tools.bench.copies import cheap_copy

PLAIN = "plain NumPy"


def place(case: Case, data: Data) -> Data:
    """Return the case's arrays in their memory layout.

    Raises:
        NotServed: NumPy has no such dtype.
    """
    if case.dtype == "bfloat16":
        raise NotServed("NumPy itself has no bfloat16; choose another dtype or engine")
    wide = np.float64 if case.dtype == "float64" else np.float32
    x, dy, residual = (None if a is None else a.astype(case.dtype) for a in (data.x, data.dy, data.residual))
    return Data(x, dy, data.gamma.astype(wide), data.beta.astype(wide), residual)


def contestants() -> list[Contestant]:
    """Return the contestants, in the order of tables."""
    return [
        Contestant(OURS, OURS, None, _ours),
        Contestant(PLAIN, PLAIN, OURS, _plain),
        Contestant(COPY, LIMIT, None, lambda case, data: _calls(data.x.copy)),
        Contestant(CHEAP_COPY, LIMIT, None, lambda case, data: cheap_copy(data.x)),
    ]


def _ours(case: Case, data: Data) -> Calls:
    from evennorm.numpy import batch_norm, batch_norm_gradient

    options: Any = {
        "axis": case.axis,
        "epsilon": EPSILON,
        "activation": "relu" if case.relu else None,
        "residual": data.residual,
    }

    def both() -> list[np.ndarray]:
        y, moments = batch_norm(data.x, data.gamma, data.beta, **options)
        return [y, *batch_norm_gradient(data.dy, data.x, moments, data.gamma, data.beta, **options)]

    return _calls(lambda: batch_norm(data.x, data.gamma, data.beta, **options)[0], both)


def _plain(case: Case, data: Data) -> Calls:
    axes = tuple(a for a in range(len(case.shape)) if a != case.axis % len(case.shape))
    row = tuple(case.channels if a not in axes else 1 for a in range(len(case.shape)))
    dtype, wide = data.x.dtype, data.gamma.dtype
    count = data.x.size // case.channels

    def forward() -> tuple[np.ndarray, ...]:
        x = data.x.astype(wide, copy=False)
        mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        inverse = 1 / np.sqrt(variance + EPSILON)
        y = (x - mean) * (data.gamma.reshape(row) * inverse) + data.beta.reshape(row)
        if data.residual is not None:
            y += data.residual
        if case.relu:
            np.maximum(y, 0, out=y)
        return y.astype(dtype, copy=False), x, mean, inverse

    def both() -> list[np.ndarray]:
        y, x, mean, inverse = forward()
        dz = np.where(y > 0, data.dy, 0) if case.relu else data.dy
        dz = dz.astype(wide, copy=False)
        xhat = (x - mean) * inverse
        d_beta, d_gamma = dz.sum(axes), (dz * xhat).sum(axes)
        dx = data.gamma.reshape(row) * inverse * (dz - d_beta.reshape(row) / count - xhat * (d_gamma.reshape(row) / count))
        gradients = [dx.astype(dtype, copy=False), d_gamma, d_beta]
        return [y, *gradients] if data.residual is None else [y, *gradients, dz.astype(dtype, copy=False)]

    return _calls(lambda: forward()[0], both)


def _calls(y: Callable[[], np.ndarray], both: Callable[[], list[np.ndarray]] | None = None) -> Calls:
    def values(found: Any) -> list[np.ndarray]:
        arrays = [found] if isinstance(found, np.ndarray) else [a for a in found if a is not None]
        return [a.astype(np.promote_types(a.dtype, np.float32), copy=False) for a in arrays]

    return Calls(y, both, values)
