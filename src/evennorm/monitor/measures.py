"""Measure how far moving statistics are off, and which channels are dead."""

from __future__ import annotations

from typing import Any

import numpy as np

DEAD = 1e-3
"""A gamma below this part of the layer's median is as good as 0."""
_DEAD_AT_LEAST = 1e-6


def drifts(mean: Any, moving_mean: Any, moving_variance: Any, epsilon: float) -> np.ndarray:
    """Return |mean - moving_mean| / sqrt(moving_variance + epsilon) of each channel; infinite where that is no number.

    Example:
        >>> drifts([1.0, 2.0], [0.0, 2.0], [0.25, 1.0], 0.0).tolist()
        [2.0, 0.0]
    """
    found = np.asarray(mean, "float64")
    with np.errstate(invalid="ignore", over="ignore"):
        variance = np.maximum(np.asarray(moving_variance, "float64").reshape(found.shape), 0)
        scale = np.sqrt(variance + epsilon + np.finfo("float32").tiny)
        found = np.abs(found - np.asarray(moving_mean, "float64").reshape(found.shape)) / scale
    return np.where(np.isfinite(found), found, np.inf)


def drift(mean: Any, moving_mean: Any, moving_variance: Any, epsilon: float) -> float:
    """Return the root mean square of `drifts` over the channels."""
    return float(np.sqrt(np.mean(drifts(mean, moving_mean, moving_variance, epsilon) ** 2)))


def variance_ratio(variance: Any, moving_variance: Any, epsilon: float) -> float:
    """Return the median over the channels of one variance divided by another, epsilon added to both."""
    tiny = epsilon + np.finfo(np.float32).tiny
    found = np.asarray(variance, "float64")
    both = (found + tiny) / (np.maximum(np.asarray(moving_variance, "float64").reshape(found.shape), 0) + tiny)
    return float(np.median(np.where(np.isfinite(both), both, np.inf)))


def dead_below(gamma: Any) -> float:
    """Return the size below which a channel's gamma is as good as 0: 1e-3 of the layer's median, at least 1e-6."""
    return max(DEAD * float(np.median(np.abs(np.asarray(gamma, "float64")))), _DEAD_AT_LEAST)


def dead_channels(gamma: Any) -> int:
    """Return how many channels give beta whatever comes in.

    Example:
        >>> dead_channels([1.0, -2.0, 1e-9, 0.0])
        2
    """
    return int(np.count_nonzero(np.abs(np.asarray(gamma, "float64")) < dead_below(gamma)))
