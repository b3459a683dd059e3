"""Hold state that a layer carries through training besides its weights: not saved, not counted, not seen by Keras's
layer."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


class Bookkeeping:
    """Variables that must survive compiled training steps without being weights.

    `Layer.weights` and saved files have to be those of Keras's layer, so these variables stand in `Layer.variables` only, as
    the states of random seeds do.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str):
        self.skipped_batches = self._variable((), "int32", "skipped_batches")
        self.moving_mean_low = self._variable(shape, dtype, "moving_mean_low")

    @staticmethod
    def _variable(shape: tuple[int, ...], dtype: str, name: str) -> Any:
        layout = None if shape else _of_a_scalar()
        return keras.Variable("zeros", shape=shape, dtype=dtype, trainable=False, autocast=False, name=name, layout=layout)

    @property
    def variables(self) -> list[Any]:
        return [self.skipped_batches, self.moving_mean_low]

    def count(self, accepted: Any) -> None:
        """Count a batch that was not accepted; `accepted` is a boolean scalar."""
        self.skipped_batches.assign(ops.add(self.skipped_batches, 1 - ops.cast(accepted, "int32")))


def _of_a_scalar() -> Any:
    """Return the layout of a scalar, which lies on every device even where a pattern such as ".*norm/.*" spreads arrays with
    channels."""
    distribution = keras.distribution.distribution()
    return None if distribution is None else keras.distribution.TensorLayout([], distribution.device_mesh)
