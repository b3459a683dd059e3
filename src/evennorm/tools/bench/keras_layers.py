"""Build Keras's layer, with the layers it needs around it, or evennorm's, as one function for a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import EPSILON, Data

POLICIES = {"bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


class Built(NamedTuple):
    """A function of x and residual that normalizes as in training, and the layer in it that has the weights."""

    apply: Callable[[Any, Any], Any]
    layer: Any


def theirs(case: Case, data: Data) -> Built:
    """Build BatchNormalization, Add and ReLU: as many of Keras's layers as the case needs."""
    import keras

    policy = POLICIES.get(case.dtype, case.dtype)
    layer = keras.layers.BatchNormalization(axis=case.axis, epsilon=EPSILON, dtype=policy)
    add = keras.layers.Add(dtype=policy)
    relu = keras.layers.ReLU(dtype=policy)

    def apply(x: Any, residual: Any) -> Any:
        y = layer(x, training=True)
        if residual is not None:
            y = add([y, residual])
        return relu(y) if case.relu else y

    return Built(apply, _built(layer, case, data))


def ours(case: Case, data: Data) -> Built:
    """Build the layer that does all of it."""
    from evennorm.keras import BatchNormalization

    policy = POLICIES.get(case.dtype, case.dtype)
    activation = "relu" if case.relu else None
    layer = BatchNormalization(axis=case.axis, epsilon=EPSILON, activation=activation, dtype=policy)

    def apply(x: Any, residual: Any) -> Any:
        return layer(x, training=True) if residual is None else layer(x, training=True, residual=residual)

    return Built(apply, _built(layer, case, data))


def _built(layer: Any, case: Case, data: Data) -> Any:
    layer.build(case.shape)
    layer.gamma.assign(data.gamma)
    layer.beta.assign(data.beta)
    return layer
