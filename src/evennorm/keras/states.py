"""Read BatchNormStates from a Keras model, and write them into a model or a new layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from evennorm.errors import ArgumentError
from evennorm.keras.layer import BatchNormalization
from evennorm.keras.network import batch_norm_state
from evennorm.keras.program import LayerStatistics, layers_by_path
from evennorm.keras.roles import BATCH_NORMS
from evennorm.models.state import BatchNormState, matched


def read_states(model: keras.Model) -> dict[str, BatchNormState]:
    """Return the state of every batch normalization, Keras's and ours, by the layer's path.

    Example:
        >>> import keras
        >>> from evennorm.keras import read_states
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
        >>> state = read_states(model)["bn"]
        >>> state.decay, state.epsilon, state.variance.tolist()
        (0.99, 0.001, [1.0, 1.0, 1.0, 1.0])
    """
    return {path: batch_norm_state(layer, path) for path, layer in _layers(model).items()}


def write_states(model: keras.Model, states: Mapping[str, BatchNormState]) -> None:
    """Give the layers of a model, which is changed in place, the states of another model of any framework.

    gamma, beta and statistics as they are, epsilon and momentum in Keras's convention: so the layer predicts what the other
    predicted. States go to layers by their paths, or by their order where no path fits.

    Raises:
        InputError: states and layers do not fit each other.
        ArgumentError: a layer without gamma or beta would have to have one, or Keras's layer to average cumulatively.

    Example:
        >>> import keras, torch
        >>> from evennorm.keras import read_states, write_states
        >>> from evennorm.torch import read_states as read_torch
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
        >>> write_states(model, read_torch(torch.nn.Sequential(torch.nn.BatchNorm1d(4))))
        >>> model.layers[0].momentum, model.layers[0].epsilon
        (0.9, 1e-05)
    """
    layers = _layers(model)
    channels = {path: int(np.prod(layer.moving_mean.shape)) for path, layer in layers.items()}
    found = matched(states, channels)
    for path, state in found.items():
        _check(layers[path], state)
    for path, state in found.items():
        _write(layers[path], path, state)


def layer_of(state: BatchNormState, **arguments: Any) -> BatchNormalization:
    """Make a new layer of ours in this state, to be called on inputs whose channel axis is `axis`, by default the state's.

    Example:
        >>> import numpy as np
        >>> from evennorm import BatchNormState
        >>> from evennorm.keras.states import layer_of
        >>> state = BatchNormState("bn", 0.0, 0.9, mean=np.array([1.0]), variance=np.array([4.0]))
        >>> np.asarray(layer_of(state)(np.array([[5.0]], "float32"))).tolist()
        [[2.0]]
    """
    names = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "variance": "moving_variance"}
    held = {name: getattr(state, field) for field, name in names.items()}
    options = {
        "axis": state.axis if len(state.axis) > 1 else state.axis[0],
        "momentum": state.decay,
        "epsilon": state.epsilon,
        "scale": state.gamma is not None,
        "center": state.beta is not None,
        "unbiased_variance": state.unbiased,
        "mode": state.mode,
        **{f"{name}_initializer": keras.initializers.Constant(value) for name, value in held.items() if value is not None},
    }
    return BatchNormalization(**{**options, **arguments})


def _layers(model: keras.Model) -> dict[str, Any]:
    return {path: layer for path, layer in layers_by_path(model).items() if isinstance(layer, BATCH_NORMS) and layer.built}


def _check(layer: Any, state: BatchNormState) -> None:
    for name, neutral in (("gamma", 1), ("beta", 0)):
        value = getattr(state, name)
        if getattr(layer, name) is None and value is not None and (value != neutral).any():
            word = "scale" if name == "gamma" else "center"
            raise ArgumentError(f"{layer.name!r} has no {name}, and {state.name!r} has; build it with {word}=True")
    if state.decay is None and not isinstance(layer, BatchNormalization):
        raise ArgumentError(
            f"{state.name!r} averages all batches alike, which Keras's layer cannot; use evennorm.keras.BatchNormalization, "
            "or replace decay in the state"
        )
    if state.decay is None and not hasattr(layer, "num_batches"):
        raise ArgumentError(f"{state.name!r} averages all batches alike; build {layer.name!r} with momentum=None")


def _write(layer: Any, path: str, state: BatchNormState) -> None:
    for name, neutral in (("gamma", 1.0), ("beta", 0.0)):
        variable, value = getattr(layer, name), getattr(state, name)
        if variable is not None:
            variable.assign(np.full(variable.shape, neutral) if value is None else np.reshape(value, variable.shape))
    layer.epsilon, layer.momentum = state.epsilon, state.decay
    if state.mean is not None and state.variance is not None:
        LayerStatistics(path, layer).write(state.mean.astype("float64"), state.variance.astype("float64"))
    if state.decay is None and state.updates is not None:
        layer.num_batches.assign(state.updates)
