"""Train by the compiled CPU kernels, as TensorFlow operations on views.

XLA knows no operations but its own. A graph that is traced for XLA uses the composed form (evennorm.tensorflow); and
since a graph may also be called from a program that XLA compiles later, each graph holds both forms under a DeviceIndex,
which is the CPU for TensorFlow and no device for XLA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.eager import forwardprop_util
from tensorflow.python.ops.parallel_for.pfor import RegisterPFor, wrap

from evennorm.core.activation import LINEAR, Activation, gated_by, is_closed
from evennorm.core.call import Call, Formula
from evennorm.core.moments import Moments, moments
from evennorm.core.normalize import Gradients
from evennorm.kernels import parts, reference
from evennorm.kernels import tensorflow as library
from evennorm.tensorflow.composed import OPTIONAL
from evennorm.tensorflow.namespace import Tensor, under_xla, xp


def _load() -> Any:
    """Return the operations as Python functions; None where they were not built, or were built for another TensorFlow."""
    if not library.AVAILABLE:
        return None
    try:
        found = tf.load_op_library(library.PATH)
    except tf.errors.NotFoundError as error:
        parts.keep("_tensorflow", error)
        return None
    if not hasattr(found, "evennorm_forward"):
        parts.keep(
            "_tensorflow",
            f"TensorFlow {tf.__version__} lacks the C API for operations",
            "install TensorFlow 2.21, which has it",
        )
        return None
    library.loaded()
    return found


_operations = _load()
AVAILABLE = _operations is not None


@RegisterPFor("DeviceIndex")
def _(loop: Any) -> Any:
    """Return the same device in every turn of tf.vectorized_map, which TensorFlow assumes for other operations only."""
    return wrap(tf.raw_ops.DeviceIndex(device_names=loop.get_attr("device_names")), False)


def supports(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether the operations support these tensors: not in forward mode, for which TensorFlow looks into
    operations, even through a custom_gradient."""
    tensors = [tf.convert_to_tensor(tensor) for tensor in (x, *others) if tensor is not None]
    return AVAILABLE and not under_xla() and not forwardprop_util.pack_tangents(tensors).tangents


@tf.autograph.experimental.do_not_convert
def train(
    call: Call,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Moments]:
    """Compute `composed.train` without a mask, and with a slope of 0 or more, so that y tells where the activation
    is closed."""
    wide = tf.float64 if x.dtype == tf.float64 else tf.float32
    casts = {"gamma": (gamma, wide), "beta": (beta, wide), "residual": (residual, x.dtype)}
    optional = {name: tf.cast(tensor, dtype) for name, (tensor, dtype) in casts.items() if tensor is not None}
    operation = _Operation(tuple(optional), call)

    @tf.custom_gradient
    def differentiable(x: Tensor, *tensors: Tensor) -> Any:
        # Computed from constants: what is saved carries no derivatives, and backward knows that it comes from x.
        y, *saved = operation.forward(*map(tf.stop_gradient, (x, *tensors)))

        def gradient(dy: Tensor, _: Tensor, d_mean: Tensor, d_variance: Tensor) -> Any:
            return operation.backward(dy, d_mean, d_variance, y, saved, x, *tensors)

        return (y, *saved[:3]), gradient

    _, outer, _, inner = xp.shape(x)
    y, *statistics = differentiable(x, *optional.values())
    return y, Moments(outer * inner, *statistics)


class _Numbers(NamedTuple):
    """The settings of a call, read from the attributes of its operation."""

    epsilon: float
    activation: Activation


class _Operation:
    """The settings that are known when a graph is traced. Tensors are x and those of `given`, in their order."""

    def __init__(self, given: tuple[str, ...], call: Call):
        self.given = given
        self.call = call
        self.keeps_mask = "residual" in given and call.activation != LINEAR
        numbers = {"epsilon": call.epsilon, "negative_slope": call.activation.slope, "limit": call.activation.limit}
        self.attributes = {name: repr(float(value)) for name, value in numbers.items()}

    def forward(self, x: Tensor, *tensors: Tensor) -> list[Tensor]:
        """Compute y, mean, mean_low, variance, and the activation mask, where backward needs it."""
        named = self._named(tensors)

        def compiled() -> list[Tensor]:
            parameters = (_or_empty(named[name], x) for name in ("gamma", "beta"))
            residual = tf.zeros((0,), x.dtype) if named["residual"] is None else named["residual"]
            return list(_operations.evennorm_forward(x, *parameters, residual, keep_mask=self.keeps_mask, **self.attributes))

        def composed() -> list[Tensor]:
            y, statistics = reference.forward(xp, self.call, x, **named, mask=None)
            return [y, *statistics[1:], tf.zeros((0,), tf.uint8)]

        results = _on_cpu(compiled, composed)
        results[0].set_shape(x.shape)
        for statistic in results[1:4]:
            statistic.set_shape((x.shape[0], x.shape[2]))
        return results

    def backward(
        self, dy: Tensor, d_mean: Tensor, d_variance: Tensor, y: Tensor, saved: list[Tensor], x: Tensor, *tensors: Tensor
    ) -> list[Tensor]:
        """Compute the derivatives by `tensors`, x first."""
        named = self._named(tensors)
        mean, mean_low, variance, mask = saved

        def compiled() -> list[Tensor]:
            parameters = (_or_empty(named[name], x) for name in ("gamma", "beta"))
            dx, d_gamma, d_beta, d_residual = _operations.evennorm_backward(
                dy,
                d_mean,
                d_variance,
                x,
                *parameters,
                mean,
                mean_low,
                variance,
                mask,
                keep_mask=self.keeps_mask,
                **self.attributes,
            )
            return self._found(Gradients(dx, d_gamma, d_beta, d_residual if self.keeps_mask else dy))

        def composed() -> list[Tensor]:
            dz, call = dy, self.call
            if self.keeps_mask:  # y tells, so that the residual need not be kept
                dz = gated_by(xp, dy, is_closed(y, call.activation), call.activation)
                call = replace(call, activation=LINEAR)
            g = _composed_backward(call, dz, d_mean, d_variance, x, named["gamma"], named["beta"])
            return self._found(g._replace(residual=dz))

        results = _on_cpu(compiled, composed)
        for result, tensor in zip(results, (x, *tensors), strict=True):
            result.set_shape(tensor.shape)
        return results

    def _named(self, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        return {**dict.fromkeys(OPTIONAL), **dict(zip(self.given, tensors, strict=True))}

    def _found(self, gradients: Gradients) -> list[Tensor]:
        return [gradients.x, *(getattr(gradients, name) for name in self.given)]


def _composed_backward(
    call: Formula,
    dy: Tensor,
    d_mean: Tensor,
    d_variance: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> Gradients:
    """Compute the gradients as functions of x, its moments included, that can be differentiated. The residual is handled
    before."""
    statistics = moments(xp, reference.wide(xp, x))
    return reference.backward(xp, call, dy, x, statistics, gamma, beta, None, None, d_mean, d_variance)


tf.no_gradient("EvennormForward")  # what is saved carries no derivatives


@tf.RegisterGradient("EvennormBackward")
def _second_derivatives(operation: tf.Operation, *upstream: Tensor) -> list[Tensor | None]:
    """Compute the second derivatives of the composed form."""
    dy, d_mean, d_variance, x, gamma, beta, *saved = operation.inputs
    attributes = {name: operation.get_attr(name) for name in ("keep_mask", "epsilon", "negative_slope", "limit")}
    epsilon, *numbers = (float(attributes[name]) for name in ("epsilon", "negative_slope", "limit"))
    activation = Activation(*numbers)
    share = None
    if attributes["keep_mask"]:
        constants = tf.zeros_like(d_mean), tf.zeros_like(d_variance), *map(tf.stop_gradient, (x, gamma, beta))
        share = _operations.evennorm_backward(tf.ones_like(dy), *constants, *saved, **attributes).d_residual
        share.set_shape(dy.shape)
        activation = LINEAR
    given = [tensor for tensor in (gamma, beta) if tensor.shape != (0,)]
    inputs = [dy, d_mean, d_variance, x, *given]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        dz = dy if share is None else dy * share
        gamma, beta = (None if tensor.shape == (0,) else tensor for tensor in (gamma, beta))
        g = _composed_backward(_Numbers(epsilon, activation), dz, d_mean, d_variance, x, gamma, beta)
        outputs = [g.x, g.gamma, g.beta, dz if share is not None else None]
        wanted = [(value, by) for value, by in zip(outputs, upstream, strict=True) if value is not None]
    values, directions = zip(*wanted, strict=True)
    gradients = tape.gradient(values, inputs, output_gradients=directions)
    if gradients[0] is None:  # everything depends on dy, but TensorFlow hides it from the tape and would continue with zeros
        raise NotImplementedError(
            "batch normalization has forward mode inside a tf.function or without one; received a ForwardAccumulator around "
            "a tf.function; move it inside, or set EVENNORM_KERNEL=reference"
        )
    found = iter(gradients)
    by_input = [next(found) if tensor.shape != (0,) else None for tensor in operation.inputs[:6]]
    return by_input + [None] * len(saved)


def _or_empty(parameter: Tensor | None, x: Tensor) -> Tensor:
    """Return the parameter, or the empty tensor that the operations take in place of a missing one."""
    return tf.zeros((0,), tf.float64 if x.dtype == tf.float64 else tf.float32) if parameter is None else parameter


def _on_cpu(compiled: Callable[[], list[Tensor]], composed: Callable[[], list[Tensor]]) -> list[Tensor]:
    if tf.executing_eagerly():
        return compiled()
    return list(tf.switch_case(tf.raw_ops.DeviceIndex(device_names=["CPU"]), [compiled], composed))
