"""Log the batch normalizations of a Keras model while `fit` trains it."""

from __future__ import annotations

from typing import Any

import keras

from evennorm.keras.program import layers_by_path
from evennorm.keras.states import read_states
from evennorm.monitor import Recorder
from evennorm.monitor.recorder import EVERY, States
from evennorm.monitor.writers import To


class StatisticsMonitor(keras.callbacks.Callback):
    """Log the batch normalizations of a model, Keras's and evennorm's, during `fit`.

    A record is taken after the first step and after every n-th one: per layer the minimum, median and maximum of gamma, beta
    and of the mean and variance of the batch and of the moving ones; the drift of the moving statistics; dead channels; and
    the batches that the layer has skipped. Between records nothing is read. Steps are counted over all epochs, and over all
    calls of `fit` with this callback.

    Args:
        to: a folder, for TensorBoard; a file that ends in `.csv`, which is appended to; or a function that is called with
            the step, the layer's path and a dict of numbers.
        every: steps between two records.

    Raises:
        ArgumentError: `every` below 1.
        InputError: a file that holds something else, or a place that cannot be written to.
        MissingExtra: logging to TensorBoard needs the package tensorboardX.

    Example:
        >>> import keras, numpy as np
        >>> from evennorm.keras import StatisticsMonitor
        >>> seen = []
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="bn"), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> see = StatisticsMonitor(lambda step, layer, found: seen.append((step, layer, found["dead_channels"])), every=2)
        >>> history = model.fit(np.ones((16, 3)), np.ones(16), batch_size=4, verbose=0, callbacks=[see])
        >>> seen
        [(1, 'bn', 0), (2, 'bn', 0), (4, 'bn', 0)]
    """

    def __init__(self, to: To, every: int = EVERY):
        super().__init__()
        self._recorder = Recorder(self._read, to, every)
        self._together = 1
        """Steps of one execution."""
        self._running = 0
        """Steps of the execution that is not recorded yet."""

    def on_train_begin(self, logs: Any = None) -> None:
        self._together = int(getattr(self.model, "steps_per_execution", 1) or 1)
        self._running = 0  # a training that was interrupted left its last step undone

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        of_epoch = self.params.get("steps")  # where known: the last execution of an epoch may be shorter
        self._finish()
        self._running = min(self._together, of_epoch - batch) if of_epoch else self._together
        self._recorder.before(self._running)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._finish()

    def on_train_end(self, logs: Any = None) -> None:
        self._recorder.close()

    def _finish(self) -> None:
        """Record the last execution when the next one begins: for `on_train_batch_end`, Keras waits for each step's loss."""
        if self._running:
            self._recorder.after(self._running)
        self._running = 0

    def _read(self) -> States:
        model = self.model  # on JAX, reading this makes Keras update the variables
        layers = layers_by_path(model)
        states = read_states(model)
        return {path: (state, getattr(layers[path], "skipped_batches", None)) for path, state in states.items()}
