"""Give NumPy's functions the names that `core` calls. `core` on NumPy float64 is the oracle for every kernel."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from evennorm.core.namespace import Namespace, Summation


class _NumPy:
    """`core`'s array namespace for NumPy."""

    float32 = np.dtype("float32")
    float64 = np.dtype("float64")
    widest = float64
    summation: Summation = "blocks"
    reshape = staticmethod(np.reshape)
    transpose = staticmethod(np.transpose)
    broadcast_to = staticmethod(np.broadcast_to)
    concatenate = staticmethod(np.concatenate)
    where = staticmethod(np.where)
    maximum = staticmethod(np.maximum)
    minimum = staticmethod(np.minimum)
    sqrt = staticmethod(np.sqrt)
    isfinite = staticmethod(np.isfinite)
    all = staticmethod(np.all)
    any = staticmethod(np.any)

    @staticmethod
    def shape(x: np.ndarray) -> tuple[int, ...]:
        return x.shape

    @staticmethod
    def dtype(x: np.ndarray) -> np.dtype:
        return x.dtype

    @staticmethod
    def astype(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.asarray(x).astype(dtype, copy=False)

    @staticmethod
    def asarray(value: Any, like: np.ndarray) -> np.ndarray:
        return np.asarray(value, dtype=like.dtype)

    @staticmethod
    def boolean(x: Any) -> np.ndarray:
        return np.asarray(x, dtype=bool)

    @staticmethod
    def sum(x: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
        return np.sum(x, axis=axis, dtype=x.dtype)

    @staticmethod
    def leaky_relu(x: np.ndarray, slope: float) -> np.ndarray:
        return np.where(x <= 0, 0.0 if slope == 0 else slope * x, x)

    @staticmethod
    def relu6(x: np.ndarray) -> np.ndarray:
        return np.clip(x, 0.0, 6.0)

    @staticmethod
    def stop_gradient(x: np.ndarray) -> np.ndarray:
        return x

    @staticmethod
    def rounded(x: np.ndarray) -> np.ndarray:
        return x


xp = cast(Namespace, _NumPy())
