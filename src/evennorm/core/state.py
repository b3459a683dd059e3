"""One batch-normalization layer as a record: what it is set to and what it holds, wherever it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BatchNormState:
    """Hyperparameters and arrays of one layer, in the conventions of the core.

    Arrays are NumPy's, of shape (channels,), in the dtype they were stored in; None where the layer has none.
    """

    name: str
    """The layer's path in its model."""
    epsilon: float
    decay: float | None
    """What the old average weighs: Keras's momentum, 1 - torch's. None: the average of all batches so far."""
    gamma: Any = None
    beta: Any = None
    mean: Any = None
    """The moving average of the mean."""
    variance: Any = None
    """The moving average of the variance."""
    axis: tuple[int, ...] = (-1,)
    """The channel axes of its input."""
    unbiased: bool = False
    """Whether the moving variance follows the unbiased variance of the batches, as torch's does."""
    updates: int | None = None
    """How many batches the averages have followed, where the layer counts them."""
    mode: int = 0
    """Keras 1's: 0 moving statistics at inference, 1 each sample on its own, 2 the batch's statistics always."""
    synchronized: bool = False
    """Whether the statistics of a batch are taken over all replicas."""
    virtual_batch_size: int | None = None
    """Samples per ghost batch, where a batch is normalized in parts."""
    renorm: bool = False
    """Whether it trains by batch renormalization."""
