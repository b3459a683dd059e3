"""Models and their statistics in float64 NumPy, for the tests of recalibration."""

from __future__ import annotations

from typing import Any

import numpy as np


def statistics(x: np.ndarray, axis: int = -1, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each channel, over the values that the mask leaves."""
    x = np.moveaxis(np.asarray(x, "float64"), axis, -1)
    rows = x.reshape(-1, x.shape[-1]) if mask is None else x[np.asarray(mask, bool)]
    return rows.mean(axis=0), rows.var(axis=0)


def array(value: Any) -> np.ndarray:
    import keras

    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()
    return np.asarray(keras.ops.convert_to_numpy(value))


def check(layer: Any, x: np.ndarray, axis: int = -1, mask: np.ndarray | None = None, bound: float = 1e-6) -> None:
    """The moving statistics of a layer are those of x: to `bound` of a standard deviation, and of the variance."""
    torch = hasattr(layer, "running_mean")
    mean, variance = statistics(x, axis, mask)
    found_mean = array(layer.running_mean if torch else layer.moving_mean).astype("float64").reshape(mean.shape)
    found_variance = array(layer.running_var if torch else layer.moving_variance).astype("float64").reshape(mean.shape)
    scale = np.maximum(np.sqrt(variance), np.abs(mean))
    np.testing.assert_array_less(np.abs(found_mean - mean), bound * scale + 1e-12)
    np.testing.assert_array_less(np.abs(found_variance - variance), bound * variance + 1e-12)
