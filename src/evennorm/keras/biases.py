"""Copy a Keras model without the biases that batch normalization subtracts; predictions stay the same."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import Operation, layers

from evennorm.keras.graph import copy_layer, graph, models_in, rebuild


def without_biases(model: keras.Model, biased: Mapping[keras.Layer, Sequence[keras.Layer]]) -> keras.Model:
    """Return a copy of `model` in which some layers have no bias, with the bias subtracted from the moving means after them.

    Args:
        model: a Sequential or functional model.
        biased: linear layers, each with the batch normalizations that read it; these read nothing else.

    Raises:
        ArgumentError: a subclassed model, or a layer that its configuration does not reproduce.
    """
    fresh: dict[Operation, Operation] = {}

    def copy(operation: Operation) -> Operation:
        changes: dict[str, Any] = {}
        if operation in biased:
            changes = {"bias_axes": None} if isinstance(operation, layers.EinsumDense) else {"use_bias": False}
        fresh[operation] = copy_layer(operation, **changes)
        return fresh[operation]

    result = rebuild(model, copy)
    for linear, norms in biased.items():
        bias = _array(linear.bias)
        for norm in norms:
            mean = fresh[norm].moving_mean
            mean.assign((_array(norm.moving_mean) - bias.reshape(mean.shape)).astype("float32"))
    _compile_alike(model, result)
    return result


def can_lose_bias(model: keras.Model) -> set[Operation]:
    """Return the operations of a model and of those nested in it, which a copy may change; none for a subclassed model."""
    try:
        return {operation for inner in models_in(model) for operation in _operations(inner)}
    except ValueError:
        return set()


def _operations(model: keras.Model) -> list[Operation]:
    return [x for x in graph(model).operations if not isinstance(x, layers.Wrapper)]


def _array(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable)).astype("float64")


def _compile_alike(model: keras.Model, copy: keras.Model) -> None:
    """Compile the copy with a new optimizer, whose step count is that of the old one."""
    if not model.compiled:
        return
    try:
        copy.compile_from_config(model.get_compile_config())
        copy.optimizer.iterations.assign(model.optimizer.iterations.value)
    except (TypeError, ValueError, AttributeError):
        warnings.warn(f"the copy of {model.name!r} is not compiled; compile it again", stacklevel=3)
