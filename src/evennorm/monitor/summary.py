"""Summarize one step of training for one layer: its statistics, those of the batch, drift and dead channels."""

from __future__ import annotations

from typing import Any

import numpy as np

from evennorm.models.state import BatchNormState
from evennorm.monitor.measures import dead_channels, drift, variance_ratio

_ARRAYS = ("gamma", "beta", "moving_mean", "moving_variance", "batch_mean", "batch_variance")
FIELDS = (
    *(f"{array}_{part}" for array in _ARRAYS for part in ("min", "median", "max")),
    "drift",
    "variance_ratio",
    "dead_channels",
    "skipped_batches",
)
"""The names of the numbers of a summary, in the order of the columns of a CSV file."""


def summary(before: BatchNormState, after: BatchNormState, batches: int = 1) -> dict[str, float]:
    """Return the numbers of one layer after a step, by the names in `FIELDS`; what is not known is left out.

    The statistics of the batch are those by which the moving ones moved, (after - decay * before) / (1 - decay): no pass
    over the activations is needed. They are not known where the moving statistics stand still.

        drift = sqrt(mean over channels of (batch_mean - moving_mean)^2 / (moving_variance + epsilon))
        variance_ratio = median over channels of (batch_variance + epsilon) / (moving_variance + epsilon)

    both by the moving statistics before the step.

    Args:
        before, after: the state of the layer before and after the step.
        batches: how often the statistics were updated in between; of several the batch is a weighted average.

    Example:
        >>> import numpy as np
        >>> from evennorm import BatchNormState
        >>> from evennorm.monitor import summary
        >>> before = BatchNormState("bn", 0.0, 0.9, mean=np.array([0.0, 2.0]), variance=np.array([1.0, 4.0]))
        >>> after = BatchNormState("bn", 0.0, 0.9, mean=np.array([0.3, 2.0]), variance=np.array([1.0, 4.4]))
        >>> found = summary(before, after)
        >>> round(found["batch_mean_max"], 6), round(found["drift"], 6), round(found["batch_variance_max"], 6)
        (3.0, 2.12132, 8.0)
    """
    arrays: dict[str, Any] = {
        "gamma": after.gamma,
        "beta": after.beta,
        "moving_mean": after.mean,
        "moving_variance": after.variance,
    }
    numbers: dict[str, float] = {}
    batch = _batch(before, after, batches)
    if batch is not None:
        arrays |= {"batch_mean": batch[0], "batch_variance": batch[1]}
        numbers["drift"] = drift(batch[0], before.mean, before.variance, after.epsilon)
        numbers["variance_ratio"] = variance_ratio(batch[1], before.variance, after.epsilon)
    found = {
        f"{name}_{part}": value
        for name, values in arrays.items()
        if values is not None and np.size(values)
        for part, value in zip(("min", "median", "max"), _extent(values), strict=True)
    }
    if after.gamma is not None:
        numbers["dead_channels"] = dead_channels(after.gamma)
    return found | numbers


def _extent(values: Any) -> tuple[float, float, float]:
    """Minimum, median and maximum, by sorting once; NaN, which is sorted last, where one value is."""
    ordered = np.sort(np.asarray(values, "float64"), axis=None)
    low, high, middle = float(ordered[0]), float(ordered[-1]), ordered.size // 2
    if high != high:
        return high, high, high
    return low, float(ordered[middle] + ordered[-1 - middle]) / 2, high


def _batch(before: BatchNormState, after: BatchNormState, batches: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and variance of the batch that moved the statistics; None where nothing moved."""
    if before.mean is None or after.mean is None or before.variance is None or after.variance is None:
        return None
    if np.array_equal(before.mean, after.mean) and np.array_equal(before.variance, after.variance):
        return None
    if before.updates is not None and after.updates is not None:
        batches = after.updates - before.updates
    if after.decay is None:  # all batches weigh the same
        kept = (before.updates or 0) / after.updates if after.updates else 1.0
    else:
        kept = after.decay**batches
    if not 0 <= kept < 1:
        return None
    old, new = (np.stack([state.mean, state.variance]).astype("float64") for state in (before, after))
    mean, variance = (new - kept * old) / (1 - kept)
    return mean, np.maximum(variance, 0)
