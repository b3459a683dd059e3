"""Who is measured on NumPy, forward: our function, the formula as one writes it, copies."""

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
    """
    Raises:
        NotServed: NumPy has no such dtype.
    """
    if case.dtype == "bfloat16":
        raise NotServed("NumPy itself has no bfloat16; choose another dtype or engine")
    wide = np.float64 if case.dtype == "float64" else np.float32
    x, dy, residual = (None if a is None else a.astype(case.dtype) for a in (data.x, data.dy, data.residual))
    return Data(x, dy, data.gamma.astype(wide), data.beta.astype(wide), residual)


def contestants() -> list[Contestant]:
    """In the order of tables."""
    return [
        Contestant(OURS, OURS, None, _ours),
        Contestant(PLAIN, PLAIN, OURS, _plain),
        Contestant(COPY, LIMIT, None, lambda case, data: _calls(data.x.copy)),
        Contestant(CHEAP_COPY, LIMIT, None, lambda case, data: cheap_copy(data.x)),
    ]


def _ours(case: Case, data: Data) -> Calls:
    from evennorm.numpy import batch_norm

    options: Any = {
        "axis": case.axis,
        "epsilon": EPSILON,
        "activation": "relu" if case.relu else None,
        "residual": data.residual,
    }
    return _calls(lambda: batch_norm(data.x, data.gamma, data.beta, **options)[0])


def _plain(case: Case, data: Data) -> Calls:
    axes = tuple(a for a in range(len(case.shape)) if a != case.axis % len(case.shape))
    row = tuple(case.channels if a not in axes else 1 for a in range(len(case.shape)))

    def y() -> np.ndarray:
        x = data.x.astype(data.gamma.dtype, copy=False)
        mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        found = (x - mean) * (data.gamma.reshape(row) / np.sqrt(variance + EPSILON)) + data.beta.reshape(row)
        if data.residual is not None:
            found += data.residual
        if case.relu:
            np.maximum(found, 0, out=found)
        return found.astype(data.x.dtype, copy=False)

    return _calls(y)


def _calls(y: Callable[[], np.ndarray]) -> Calls:
    return Calls(y, None, lambda found: [found.astype(np.promote_types(found.dtype, np.float32), copy=False)])
