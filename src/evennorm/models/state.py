"""Record the settings and arrays of one batch-normalization layer, wherever it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from evennorm.errors import ArgumentError, InputError


@dataclass(frozen=True)
class BatchNormState:
    """Hyperparameters and arrays of one layer, in the conventions of the core.

    Arrays are NumPy's, of shape (channels,), in the dtype they were stored in; None where the layer has none.
    """

    name: str
    """The layer's path in its model."""
    epsilon: float
    decay: float | None
    """The weight of the old average: Keras's momentum, 1 - torch's. None: the average of all batches so far."""
    gamma: Any = None
    beta: Any = None
    mean: Any = None
    """The moving average of the mean."""
    variance: Any = None
    """The moving average of the variance."""
    axis: tuple[int, ...] = (-1,)
    """The channel axes of its input."""
    unbiased: bool = False
    """Whether the moving variance averages the unbiased variance of the batches, as torch's does."""
    updates: int | None = None
    """How many batches the averages have seen, where the layer counts them."""
    mode: int = 0
    """Keras 1's: 0 moving statistics at inference, 1 each sample on its own, 2 the batch's statistics always."""
    synchronized: bool = False
    """Whether the statistics of a batch are taken over all replicas."""
    virtual_batch_size: int | None = None
    """Samples per ghost batch, where a batch is normalized in parts."""
    renorm: bool = False
    """Whether it trains by batch renormalization."""

    @property
    def momentum_of_torch(self) -> float | None:
        """The weight of a new batch: torch's momentum.

        Example:
            >>> BatchNormState("bn", epsilon=1e-3, decay=0.99).momentum_of_torch
            0.01
        """
        return None if self.decay is None else round(1.0 - self.decay, 12)

    def with_epsilon(self, epsilon: float) -> BatchNormState:
        """Return the state that predicts the same with another epsilon: variance + epsilon stays what it is.

        Raises:
            ArgumentError: a variance would be negative.

        Example:
            >>> import numpy as np
            >>> state = BatchNormState("bn", epsilon=1e-3, decay=0.99, variance=np.array([0.5]))
            >>> state.with_epsilon(1e-5).variance.round(6).tolist()
            [0.50099]
        """
        if self.variance is None or epsilon == self.epsilon:
            return replace(self, epsilon=epsilon)
        variance = self.variance + (self.epsilon - epsilon)
        if (variance < 0).any():
            raise ArgumentError(
                f"{self.name}: variance + epsilon = {float(self.variance.min()) + self.epsilon:g} is less than the new "
                f"epsilon {epsilon:g}, and no variance is negative; keep epsilon={self.epsilon:g} or choose a smaller one"
            )
        return replace(self, epsilon=epsilon, variance=variance)

    def with_bias(self, unbiased: bool, count: int) -> BatchNormState:
        """Return the state as if its variance had averaged the other estimate of the batches, each of `count` values per
        channel.

        Moving a layer between frameworks needs no such change to predict the same; it makes statistics comparable.

        Raises:
            ArgumentError: fewer than two values, of which no unbiased variance can be told.

        Example:
            >>> import numpy as np
            >>> state = BatchNormState("bn", epsilon=1e-3, decay=0.99, variance=np.array([0.75]))
            >>> state.with_bias(True, count=4).variance.tolist()
            [1.0]
        """
        if count < 2:
            raise ArgumentError(f"an unbiased variance needs two values per channel or more; received count={count}")
        if self.variance is None or unbiased == self.unbiased:
            return self
        factor = count / (count - 1) if unbiased else (count - 1) / count
        return replace(self, unbiased=unbiased, variance=self.variance * factor)


def matched(states: Mapping[str, BatchNormState], channels: Mapping[str, int]) -> dict[str, BatchNormState]:
    """Match the states of one model to the layers of another: by their paths or, where all of those differ, by their order.

    Args:
        states: by path.
        channels: of the layers that are to get them, by path; "/" and "." are the same in paths.

    Raises:
        InputError: some names fit and others do not, or numbers of layers or channels differ.
    """

    def plain(path: str) -> str:
        return path.replace("/", ".")

    by_name = {plain(path): state for path, state in states.items()}
    common = {path: by_name[plain(path)] for path in channels if plain(path) in by_name}
    if len(common) == len(channels):
        found = common
    elif len(states) == len(channels) and not common:
        found = dict(zip(channels, states.values(), strict=True))
    else:
        missing = [path for path in channels if path not in common]
        raise InputError(
            f"states fit layers by their paths, or by their order if there are as many; there are {len(states)} states for "
            f"{len(channels)} layers, and none for {_few(missing)}; the states are of {_few(states)}"
        )
    for path, state in found.items():
        sizes = {array.size for array in (state.gamma, state.beta, state.mean, state.variance) if array is not None}
        if sizes - {channels[path]}:
            raise InputError(f"{path} has {channels[path]} channels; the state of {state.name!r} has {max(sizes)}")
    return found


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "none"
