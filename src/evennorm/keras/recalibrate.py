"""Recalibrate a Keras model when `fit` ends."""

from __future__ import annotations

from typing import Any

import keras


class Recalibrate(keras.callbacks.Callback):
    """Set the moving statistics to the exact ones of data when `fit` ends, as `evennorm.tools.recalibrate` does.

    Put it last in the list, so that it sees the weights that other callbacks restore. Nothing is read during training. A
    second call of `fit` goes on from the exact statistics, and takes them anew when it ends. Files that other callbacks
    write during training hold the statistics of training.

    Args:
        x: training data, usually without augmentation: an array, a tuple of x and y, a tf.data.Dataset, a DataLoader, a
            PyDataset, or whatever else `evennorm.tools.data.open_data` takes.
        batches: how many to take; all by default.
        batch_size: of arrays; iterables have their own.
        one_pass: take all statistics in one pass: faster, and exact for the first layers only.
        keep_frozen: leave layers alone that are not trainable.

    Attributes:
        report: what was done when `fit` last ended; None before, and where it could not be done. A warning says why not, for
            example values that are not finite, and the statistics are those of training.

    Raises:
        InputError: data that cannot be read; when training begins, samples that do not fit the model.

    Example:
        >>> import keras, numpy as np
        >>> from evennorm.keras import Recalibrate
        >>> x = np.array([[1.0], [3.0], [5.0]], "float32")
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization(name="bn"), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> history = model.fit(x, x, verbose=0, callbacks=[Recalibrate(x)])
        >>> bn = model.get_layer("bn")
        >>> [round(float(value[0]), 4) for value in (bn.moving_mean, bn.moving_variance)]
        [3.0, 2.6667]
    """

    def __init__(
        self,
        x: Any,
        *,
        batches: int | None = None,
        batch_size: int = 128,
        one_pass: bool = False,
        keep_frozen: bool = False,
    ):
        from evennorm.tools.recalibrate.at_end import AtEnd

        super().__init__()
        self.report: Any = None
        settings = {"batches": batches, "batch_size": batch_size, "one_pass": one_pass, "keep_frozen": keep_frozen}
        self._work = AtEnd(x, "keras", settings | {"measure": False})

    def on_train_begin(self, logs: Any = None) -> None:
        self.report = None
        if self.model.built:
            self._work.check(self.model)

    def on_train_end(self, logs: Any = None) -> None:
        self.report = self._work.run(self.model)
