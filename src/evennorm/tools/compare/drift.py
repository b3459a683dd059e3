"""Record how the input of one hidden unit is distributed while a model trains: figure 1 (b, c) of the paper."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras

    Probe = tuple[keras.Model, list[tuple[keras.Variable, keras.Variable]]]

PERCENTILES = (15, 50, 85)
"""Those that the paper draws."""

SAMPLES = 500


class UnitInput:
    """Of a Keras model: the input of the first unit of the last hidden activation, over training samples, in inference mode.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, figure 1, which shows one typical unit of the last hidden layer.
    """

    def __init__(self, model: keras.Model, samples: np.ndarray):
        self._samples = samples[:SAMPLES]
        self._found = _in_front_of_the_last_activation(model)

    def __call__(self) -> list[float] | None:
        """The percentiles now; None where the model has no hidden activation to look at."""
        if self._found is None:
            return None
        import keras

        probe, pairs = self._found
        for mine, theirs in pairs:
            mine.assign(np.array(theirs))  # a copy: JAX gives away the buffers of what it trains
        values = keras.ops.convert_to_numpy(probe(self._samples, training=False)).astype("float64")[..., 0]
        return percentiles(values)


def _in_front_of_the_last_activation(model: keras.Model) -> Probe | None:
    """A model of the same inputs that ends in front of the last hidden activation, and the variables it must be given.

    An activation that a layer applies itself is left out by a copy of that layer, which has variables of its own.
    """
    import keras

    from evennorm.keras.sites import has_fused_activation, is_activation

    for layer in reversed(model.layers[:-1]):
        if not (has_fused_activation(layer) or is_activation(layer)) or not hasattr(layer, "input"):
            continue
        if not hasattr(layer, "kernel") and not hasattr(layer, "gamma"):
            return keras.Model(_inputs(model), layer.input), []
        config = copy.deepcopy(layer.get_config()) | {"activation": "linear", "name": f"{layer.name}_without_activation"}
        linear = type(layer).from_config(config)
        probe = keras.Model(_inputs(model), linear(layer.input))
        return probe, list(zip(linear.variables, layer.variables, strict=True))
    return None


def _inputs(model: keras.Model) -> keras.KerasTensor | list[keras.KerasTensor]:
    return model.inputs[0] if len(model.inputs) == 1 else model.inputs


def percentiles(values: np.ndarray) -> list[float]:
    """Return those that are recorded.

    Example:
        >>> percentiles(np.arange(101))
        [15.0, 50.0, 85.0]
    """
    return [float(value) for value in np.percentile(values, PERCENTILES)]


def travel(percentiles: list[list[float]]) -> tuple[float, float] | None:
    """How far the median moved, in mean half-widths of the distribution, and how many times that width changed.

    Args:
        percentiles: 15th, 50th and 85th after each epoch.

    Example:
        >>> travel([[-1.0, 0.0, 1.0], [0.0, 1.0, 2.0], [-1.0, 1.0, 3.0]])
        (0.75, 2.0)
    """
    low, middle, high = np.array(percentiles).T
    half = (high - low) / 2
    if not len(half) or not np.isfinite(half).all() or half.min() <= 0:
        return None
    return float((middle.max() - middle.min()) / half.mean()), float(half.max() / half.min())
