"""Take the exact mean and variance of everything that normalizations receive, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from evennorm.core.moments import Moments
from evennorm.errors import InputError
from evennorm.models.state import BatchNormState
from evennorm.numpy import merge, moments


class Population:
    """Merged moments by layer, in which each batch counts as many times as it has values."""

    def __init__(self, states: Mapping[str, BatchNormState]):
        self._states = states
        self._found: dict[str, Moments] = {}
        self.batch = 0

    def add(self, path: str, x: np.ndarray, mask: np.ndarray | None) -> Moments:
        """Add a batch of inputs, and return its moments.

        Raises:
            InputError: a mean or variance that is no finite number.
        """
        state = self._states[path]
        axis = state.axis if len(state.axis) > 1 else state.axis[0]
        if isinstance(axis, int) and x.ndim == 1:
            axis = -1
        floating = x if x.dtype in (np.float32, np.float64) else x.astype("float32")
        found = moments(floating, axis=axis, mask=None if mask is None else mask.astype(bool))
        if not (np.isfinite(found.mean).all() and np.isfinite(found.variance).all()):
            raise InputError(
                f"batch {self.batch + 1} reaches {path!r} with values that are not finite, from which no statistics can be "
                "taken; remove such samples, or look for the weight that makes them by evennorm check"
            )
        self._found[path] = found if path not in self._found else merge([self._found[path], found])
        return found

    def forget(self, paths: Iterable[str]) -> None:
        """Start again for these layers."""
        for path in paths:
            self._found.pop(path, None)

    def __contains__(self, path: str) -> bool:
        return path in self._found and bool(np.any(np.asarray(self._found[path].count) > 0))

    def count(self, path: str) -> int:
        return int(np.max(np.asarray(self._found[path].count)))

    def statistics(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and variance, in float64; channels that no value reached keep their old ones."""
        found, state = self._found[path], self._states[path]
        seen = np.broadcast_to(np.asarray(found.count) > 0, found.mean.shape)
        mean, variance = found.mean + found.mean_low, found.variance
        if seen.all():
            return mean, variance
        return tuple(  # type: ignore[return-value]
            np.where(seen, new, np.asarray(old, "float64").reshape(new.shape))
            for new, old in ((mean, state.mean), (variance, state.variance))
        )


def distance(new: tuple[Any, Any], old: tuple[Any, Any], epsilon: float) -> float:
    """Return how far statistics are apart, in standard deviations of the new ones; infinite where the old ones are not
    finite."""
    scale = np.sqrt(np.asarray(new[1], "float64") + epsilon + np.finfo("float32").tiny)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.abs(new[0] - np.asarray(old[0], "float64").reshape(scale.shape)) / scale
        deviation = np.sqrt(np.maximum(np.asarray(old[1], "float64").reshape(scale.shape), 0) + epsilon)
        parts = np.concatenate([mean.ravel(), np.abs(deviation / scale - 1).ravel()])
    return float(np.max(np.where(np.isfinite(parts), parts, np.inf), initial=0.0))
