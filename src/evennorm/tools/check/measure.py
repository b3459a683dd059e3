"""Run a model on data in both modes, and compare what its layers see with what they expect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from evennorm.core.moments import Moments
from evennorm.errors import EvennormError, InputError, first_line
from evennorm.models.network import Network, Step
from evennorm.models.program import Program
from evennorm.monitor.measures import drift, drifts, variance_ratio
from evennorm.numpy import merge, moments
from evennorm.tools.check.drift import DRIFT, SPREAD
from evennorm.tools.data.batch import leaves


@dataclass(frozen=True)
class LayerMeasurement:
    """The data's statistics before one call of a layer, with the moving ones; arrays of shape (channels,)."""

    name: str
    layer: str
    trainable: bool
    epsilon: float
    count: int
    batch_mean: np.ndarray
    batch_variance: np.ndarray
    moving_mean: np.ndarray
    moving_variance: np.ndarray

    @property
    def drifts(self) -> np.ndarray:
        """Distances between the two means, in moving standard deviations."""
        return drifts(self.batch_mean, self.moving_mean, self.moving_variance, self.epsilon)

    @property
    def drift(self) -> float:
        """Root mean square of `drifts` over the channels, which `recalibrate` reports under the same name."""
        return drift(self.batch_mean, self.moving_mean, self.moving_variance, self.epsilon)

    @property
    def variance_ratio(self) -> float:
        """Median over the channels of the data's variance divided by the moving one, with epsilon added to both."""
        return variance_ratio(self.batch_variance, self.moving_variance, self.epsilon)

    @property
    def worst(self) -> int:
        return int(np.argmax(self.drifts))

    @property
    def worst_drift(self) -> float:
        return float(self.drifts[self.worst])

    @property
    def fits(self) -> bool:
        return self.drift <= DRIFT and 1 / SPREAD < self.variance_ratio < SPREAD


@dataclass(frozen=True)
class Measurements:
    """The results of a pass over data."""

    layers: tuple[LayerMeasurement, ...]
    samples: int
    batch_size: int
    output_difference: float
    """Root mean square difference of the outputs between the modes, by their standard deviation over the samples."""
    training_accuracy: float | None = None
    inference_accuracy: float | None = None

    def of(self, name: str) -> LayerMeasurement | None:
        """Return the measurement of one call."""
        return next((layer for layer in self.layers if layer.name == name), None)

    @property
    def parts_at(self) -> str:
        """The first layer whose moving statistics do not fit; if all fit, the one that is furthest off."""
        first = next((layer for layer in self.layers if not layer.fits), None)
        return (first or max(self.layers, key=lambda layer: layer.drift)).layer

    def as_dict(self) -> dict[str, object]:
        """Return the measurements for programs; numbers that are not finite become None."""
        rows = [
            {
                "name": layer.name,
                "drift": _finite(layer.drift),
                "variance_ratio": _finite(layer.variance_ratio),
                "worst_channel": layer.worst,
                "worst_drift": _finite(layer.worst_drift),
            }
            for layer in self.layers
        ]
        numbers = ("samples", "batch_size", "output_difference", "training_accuracy", "inference_accuracy")
        return {name: _finite(getattr(self, name)) for name in numbers} | {"layers": rows}


def _finite(number: float | None) -> float | None:
    return None if number is None or not np.isfinite(number) else number


def measure(
    program: Program,
    network: Network,
    batches: Iterable[tuple[Any, Any]],
    progress: Callable[[int], None] = lambda samples: None,
) -> Measurements:
    """Run each batch twice: by the moving statistics, and by the batch's, as training does but without dropout.

    Frozen layers keep to their moving statistics. Statistics of all batches are merged in float64. The model is left as it
    was.

    Raises:
        InputError: the model does not take a batch.
    """
    watch = _Watch(program, network)
    modes = _Modes()
    largest = 0
    for x, labels in batches:
        inference = _run(lambda x: program.apply(x)[0], x)
        training = _run(watch.by_batch, x)
        modes.add(inference, training, labels)
        largest = max(largest, len(inference))
        progress(modes.samples)
    return Measurements(
        watch.layers(), modes.samples, largest, modes.difference(), modes.accuracy("training"), modes.accuracy("inference")
    )


class _Watch:
    """A recorder of the input of each normalization while all normalize by the batch."""

    def __init__(self, program: Program, network: Network):
        self._program = program
        handles = {id(_inner(step.handle)): step.layer for step in network.batch_norms()}
        self._names = {path: handles[key] for path, key in self._keys() if key in handles}
        self._steps = {step.name: step for step in network.batch_norms()}
        self._follow = {step.layer: step.trainable or network.framework == "torch" for step in network.batch_norms()}
        self._seen: dict[str, Moments] = {}
        self._calls: Counter[str] = Counter()

    def _keys(self) -> Iterator[tuple[str, int]]:
        for path, statistics in self._program.layers.items():
            yield path, id(getattr(statistics, "layer", getattr(statistics, "module", None)))

    def by_batch(self, x: Any) -> np.ndarray:
        """Compute the model's first output; each layer that training would let do so normalizes by this batch."""
        layers = {path: self._program.layers[path] for path in self._names}
        before = {path: layer.snapshot() for path, layer in layers.items()}
        self._calls.clear()
        try:
            with self._program.watched(list(layers), self._look):
                return self._program.apply(x)[0]
        finally:
            for path, layer in layers.items():
                layer.restore(before[path])

    def _look(self, path: str, x: np.ndarray, mask: np.ndarray | None) -> None:
        layer = self._names[path]
        self._calls[layer] += 1
        name = layer if self._calls[layer] == 1 else f"{layer}#{self._calls[layer]}"
        step = self._steps.get(name)
        if step is None or step.state is None:
            return
        axis: Any = step.state.axis if x.ndim > 2 else -1  # torch calls the channels of (samples, channels) axis 1
        floating = x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)
        found = moments(floating, axis=axis, mask=None if mask is None else mask.astype(bool))
        self._seen[name] = merge([self._seen[name], found]) if name in self._seen else found
        if self._follow[layer]:
            mean = np.asarray(found.mean, np.float64) + np.asarray(found.mean_low, np.float64)
            self._program.layers[path].write(mean, np.asarray(found.variance, np.float64))

    def layers(self) -> tuple[LayerMeasurement, ...]:
        return tuple(_layer(self._steps[name], found) for name, found in self._seen.items())


def _inner(handle: Any) -> Any:
    """Return the layer inside TimeDistributed."""
    return handle.layer if type(handle).__name__ == "TimeDistributed" else handle


def _run(run: Callable[[Any], np.ndarray], x: Any) -> np.ndarray:
    """Run the model on a batch.

    Raises:
        InputError: the model does not take the batch.
    """
    try:
        return run(x)
    except EvennormError:
        raise
    except Exception as error:  # frameworks raise many kinds, and a model's own code may raise anything
        raise InputError(f"the model does not take a batch of shape {_shape(x)}: {first_line(error)}") from error


def _shape(x: Any) -> str:
    return " and ".join(str(np.shape(array)) for array in leaves(x))


def _layer(step: Step, found: Moments) -> LayerMeasurement:
    state = step.state
    assert state is not None  # only steps with one are measured

    def flat(values: Any) -> np.ndarray:
        return np.asarray(values, np.float64).reshape(-1)

    return LayerMeasurement(
        step.name,
        step.layer,
        step.trainable,
        state.epsilon,
        int(np.max(found.count)),
        flat(found.mean) + flat(found.mean_low),
        flat(found.variance),
        flat(state.mean),
        flat(state.variance),
    )


class _Modes:
    """Sums over batches by which the modes are told apart."""

    def __init__(self) -> None:
        self.samples = 0
        self._squares = 0.0
        self._sum: Any = 0.0
        self._sum_of_squares: Any = 0.0
        self._right: dict[str, int | None] = {"training": 0, "inference": 0}

    def add(self, inference: np.ndarray, training: np.ndarray, labels: Any) -> None:
        self.samples += len(training)
        rows = [y.reshape(len(y), -1).astype(np.float64) for y in (inference, training)]
        self._squares += float(np.sum((rows[0] - rows[1]) ** 2))
        self._sum = self._sum + rows[1].sum(0)
        self._sum_of_squares = self._sum_of_squares + (rows[1] ** 2).sum(0)
        for mode, y in (("training", training), ("inference", inference)):
            right, so_far = correct(y, labels), self._right[mode]
            self._right[mode] = None if right is None or so_far is None else so_far + right

    def difference(self) -> float:
        spread = float(np.sum(self._sum_of_squares - self._sum**2 / max(self.samples, 1)))
        if not np.isfinite(self._squares) or not np.isfinite(spread):
            return np.inf
        return float(np.sqrt(self._squares / spread)) if spread > 0 else 0.0

    def accuracy(self, mode: str) -> float | None:
        right = self._right[mode]
        return None if right is None or not self.samples else right / self.samples


def correct(outputs: np.ndarray, labels: Any) -> int | None:
    """Return how many samples are classified as their labels say; None where the labels are no classes."""
    if labels is None or outputs.ndim != 2:
        return None
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == outputs.shape[1] > 1:
        labels = labels.argmax(1)
    labels = labels.reshape(-1)
    if len(labels) != len(outputs) or outputs.shape[1] < 2 or not np.issubdtype(labels.dtype, np.integer):
        return None
    return int(np.sum(outputs.argmax(1) == labels))
