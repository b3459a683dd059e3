"""Define the contestants on TensorFlow, in tf.function: our op and layer, its fused op, Keras's layer, copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from evennorm.tools.bench import keras_layers
from evennorm.tools.bench.cases import Case
from evennorm.tools.bench.contestants import (
    CHEAP_COPY,
    COPY,
    EPSILON,
    KERAS,
    LIMIT,
    OUR_LAYER,
    OURS,
    Calls,
    Contestant,
    Data,
    NotServed,
)
from evennorm.tools.bench.copies import cheap_copy

FUSED = "fused op"


def place(case: Case, data: Data) -> Data:
    """Return the case's tensors in their memory layout, with parameters as variables."""
    wide = tf.float64 if case.dtype == "float64" else tf.float32
    x, dy, residual = (None if a is None else tf.cast(a, case.dtype) for a in (data.x, data.dy, data.residual))
    gamma, beta = (tf.Variable(tf.cast(a, wide)) for a in (data.gamma, data.beta))
    return Data(x, dy, gamma, beta, residual)


def contestants() -> list[Contestant]:
    """Return the contestants, in the order of tables."""
    return [
        Contestant(OURS, OURS, None, _ours),
        Contestant(FUSED, FUSED, OURS, _fused),
        Contestant(OUR_LAYER, OUR_LAYER, None, partial(_keras, build=keras_layers.ours)),
        Contestant(KERAS, KERAS, OUR_LAYER, partial(_keras, build=keras_layers.theirs)),
        Contestant(COPY, LIMIT, None, _copy),
        Contestant(CHEAP_COPY, LIMIT, None, lambda case, data: cheap_copy(data.x.numpy())),
    ]


def _ours(case: Case, data: Data) -> Calls:
    from evennorm.tensorflow import batch_norm

    activation = "relu" if case.relu else None

    def y(x: Any, residual: Any) -> Any:
        options: Any = {"axis": case.axis, "epsilon": EPSILON, "activation": activation, "residual": residual}
        return batch_norm(x, tf.convert_to_tensor(data.gamma), tf.convert_to_tensor(data.beta), **options)[0]

    return _calls(y, data, data.gamma, data.beta)


def _fused(case: Case, data: Data) -> Calls:
    """Return the fused op, which is not exact at large means."""
    if case.layout == "first":
        raise NotServed("TensorFlow's fused op takes channels last only on a processor")
    if case.dtype == "float64":
        raise NotServed("TensorFlow's fused op computes in float32")
    shape = case.shape if len(case.shape) == 4 else (-1, 1, 1, case.channels)

    def y(x: Any, residual: Any) -> Any:
        found, *_ = tf.compat.v1.nn.fused_batch_norm(tf.reshape(x, shape), data.gamma, data.beta, epsilon=EPSILON)
        found = tf.reshape(found, case.shape)
        if residual is not None:
            found = found + residual
        return tf.nn.relu(found) if case.relu else found

    return _calls(y, data, data.gamma, data.beta)


def _keras(case: Case, data: Data, build: Callable[[Case, Data], keras_layers.Built]) -> Calls:
    apply, layer = build(case, data)
    return _calls(apply, data, layer.gamma.value, layer.beta.value)


def _copy(case: Case, data: Data) -> Calls:
    copy = tf.function(lambda x: tf.raw_ops.DeepCopy(x=x), autograph=False)
    return Calls(lambda: copy(data.x), None, _values)


def _calls(y: Callable[[Any, Any], Any], data: Data, gamma: Any, beta: Any) -> Calls:
    """Return `y` of x and residual, and with its gradients, each as one graph."""

    @tf.function(autograph=False)
    def forward(x: Any, residual: Any) -> Any:
        return y(x, residual)

    @tf.function(autograph=False)
    def both(x: Any, residual: Any, dy: Any) -> Any:
        leaves = [leaf for leaf in (x, gamma, beta, residual) if leaf is not None]
        with tf.GradientTape() as tape:
            tape.watch([leaf for leaf in (x, residual) if leaf is not None])
            found = y(x, residual)
        return found, *tape.gradient(found, leaves, output_gradients=dy)

    return Calls(lambda: forward(data.x, data.residual), lambda: both(data.x, data.residual, data.dy), _values)


def _values(found: Any) -> list[np.ndarray]:
    arrays = (found,) if tf.is_tensor(found) else found
    return [np.asarray(a, np.promote_types(a.numpy().dtype, np.float32)) for a in arrays]
