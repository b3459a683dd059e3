"""What tests ask of the Keras backend of this process beyond Keras itself: derivatives by its own differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np

BACKEND = keras.backend.backend()
_STEPS: WeakKeyDictionary[keras.layers.Layer, Callable[..., Any]] = WeakKeyDictionary()


def array(value: Any) -> np.ndarray:
    """A tensor or variable as float64 NumPy."""
    return np.asarray(keras.ops.convert_to_numpy(value)).astype(np.float64)


def state(layer: keras.layers.Layer) -> list[np.ndarray]:
    """Copies of a layer's weights, bit for bit."""
    return [np.array(keras.ops.convert_to_numpy(weight)) for weight in layer.weights]


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """JAX has float64 only where the process asks for it."""
    if BACKEND != "jax" or dtype != "float64":
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield


def train(layer: keras.layers.Layer, x: Any, **call: Any) -> Any:
    """layer(x, training=True); on JAX compiled, since that is how it trains there, and quicker than op by op."""
    if BACKEND != "jax":
        return layer(x, training=True, **call)
    import jax

    if not layer.built:
        layer.build(x.shape)
    step = None if call else _STEPS.get(layer)
    if step is None:
        step = jax.jit(lambda weights, others, x: layer.stateless_call(weights, others, x, training=True, **call))
    if not call:
        _STEPS[layer] = step
    variables = layer.trainable_variables, layer.non_trainable_variables
    y, others = step(*([v.value for v in some] for some in variables), keras.ops.convert_to_tensor(x))
    for variable, value in zip(variables[1], others, strict=True):
        variable.assign(value)
    return y


def gradients(layer: keras.layers.Layer, x: np.ndarray, dy: np.ndarray, **call: Any) -> list[np.ndarray]:
    """Derivatives of sum(layer(x, training=True) * dy) by x and each trainable variable, in float64."""
    loss, x, weights = _scalar(layer, x, dy, call)
    if BACKEND == "jax":
        import jax

        d_x, d_weights = jax.jit(jax.grad(loss, (0, 1)))(x, weights)
        return [array(d) for d in (d_x, *d_weights)]
    if BACKEND == "torch":
        import torch

        return [array(d) for d in torch.autograd.grad(loss(x, weights), [x, *weights])]
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        value = loss(x, weights)
    return [array(d) for d in tape.gradient(value, [x, *weights])]


def second_derivatives(layer: keras.layers.Layer, x: np.ndarray, dy: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The derivative by x of sum(w * dL/dx), where L = sum(layer(x, training=True) * dy)."""
    loss, x, weights = _scalar(layer, x, dy, {})
    if BACKEND == "jax":
        import jax

        w = keras.ops.convert_to_tensor(w, x.dtype)
        return array(jax.jit(jax.grad(lambda x: (jax.grad(loss)(x, weights) * w).sum()))(x))
    if BACKEND == "torch":
        import torch

        (first,) = torch.autograd.grad(loss(x, weights), x, create_graph=True)
        return array(torch.autograd.grad((first * torch.tensor(w, dtype=x.dtype)).sum(), x)[0])
    import tensorflow as tf

    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            value = loss(x, weights)
        weighted = tf.reduce_sum(inner.gradient(value, x) * tf.cast(w, x.dtype))
    return array(outer.gradient(weighted, x))


def _scalar(
    layer: keras.layers.Layer, x: np.ndarray, dy: np.ndarray, call: dict[str, Any]
) -> tuple[Callable[[Any, list[Any]], Any], Any, list[Any]]:
    """The loss as a function of x and the trainable variables' values, and those."""
    x = keras.ops.convert_to_tensor(x, layer.compute_dtype)
    dy = keras.ops.convert_to_tensor(dy, layer.compute_dtype)
    if BACKEND == "jax":
        others = [v.value for v in layer.non_trainable_variables]

        def loss(x: Any, weights: list[Any]) -> Any:
            y, _ = layer.stateless_call(weights, others, x, training=True, **call)
            return (y * dy).sum()

        return loss, x, [v.value for v in layer.trainable_variables]
    if BACKEND == "torch":
        x = x.detach().clone().requires_grad_()
    return (
        lambda x, weights: keras.ops.sum(layer(x, training=True, **call) * dy),
        x,
        [v.value for v in layer.trainable_variables],
    )
