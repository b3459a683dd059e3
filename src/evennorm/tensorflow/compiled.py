"""Views in, y and Moments out: training by the compiled CPU kernels, as operations of TensorFlow.

XLA knows no operations but its own. Where a graph is traced for it, the composed form serves (evennorm.tensorflow); and
since a graph may also be called from a program that XLA compiles later, each graph holds both forms behind a DeviceIndex,
which is the CPU for TensorFlow and no device for XLA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import forwardprop_util
from tensorflow.python.ops.parallel_for.pfor import RegisterPFor, wrap

from evennorm.core.moments import Moments, moments
from evennorm.core.normalize import Gradients
from evennorm.kernels import reference
from evennorm.kernels import tensorflow as library
from evennorm.tensorflow.composed import OPTIONAL, differentiated_as
from evennorm.tensorflow.namespace import Tensor, under_xla, xp


def _load() -> Any:
    """The operations as Python functions; None where they were not built, or for another TensorFlow."""
    if not library.AVAILABLE:
        return None
    try:
        found = tf.load_op_library(str(library.PATH))
    except tf.errors.NotFoundError:
        return None
    if not hasattr(found, "evennorm_forward"):  # a TensorFlow without the C API for operations
        return None
    library.loaded()
    return found


_operations = _load()
AVAILABLE = _operations is not None


@RegisterPFor("DeviceIndex")
def _(loop: Any) -> Any:
    """The same device in every turn of tf.vectorized_map, which TensorFlow takes for granted of other operations alone."""
    return wrap(tf.raw_ops.DeviceIndex(device_names=loop.get_attr("device_names")), False)


def serves(x: Tensor, *others: Tensor | None) -> bool:
    """Not in forward mode, for which TensorFlow looks into operations, through a custom_gradient too."""
    tensors = [tensor for tensor in (x, *others) if tensor is not None]
    return AVAILABLE and not under_xla() and not forwardprop_util.pack_tangents(tensors).tangents


def train(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> tuple[Tensor, Moments]:
    """`composed.train` without a mask, and with a slope of 0 or more, so that y has the sign that the activation saw."""
    wide = tf.float64 if x.dtype == tf.float64 else tf.float32
    casts = {"gamma": (gamma, wide), "beta": (beta, wide), "residual": (residual, x.dtype)}
    optional = {name: tf.cast(tensor, dtype) for name, (tensor, dtype) in casts.items() if tensor is not None}
    call = _Call(tuple(optional), epsilon, negative_slope)

    @tf.custom_gradient
    def differentiable(x: Tensor, *tensors: Tensor) -> Any:
        # Of tensors that stand still, so that no tape keeps operations that have no gradient of their own.
        still = tuple(map(tf.stop_gradient, (x, *tensors)))
        y, *saved = call.forward(*still)

        def gradient(dy: Tensor, _: Tensor, d_mean: Tensor, d_variance: Tensor) -> Any:
            def fast(dy: Tensor, d_mean: Tensor, d_variance: Tensor, x: Tensor, *tensors: Tensor) -> list[Tensor]:
                return call.backward(dy, d_mean, d_variance, y, saved, x, *tensors)

            return differentiated_as(call.composed_backward, fast)(dy, d_mean, d_variance, x, *tensors)

        return (y, *saved[:3]), gradient

    _, outer, _, inner = xp.shape(x)
    y, *statistics = differentiable(x, *optional.values())
    return y, Moments(outer * inner, *statistics)


class _Call:
    """What is known when a graph is traced. Tensors are x and those of `given`, in their order."""

    def __init__(self, given: tuple[str, ...], epsilon: float, negative_slope: float):
        self.given = given
        self.options: dict[str, Any] = {"epsilon": epsilon, "negative_slope": negative_slope}
        self.keeps_signs = "residual" in given and negative_slope != 1
        self.attributes = {name: repr(float(value)) for name, value in self.options.items()}

    def forward(self, x: Tensor, *tensors: Tensor) -> list[Tensor]:
        """y, mean, mean_low, variance, and the signs that the activation saw, where backward needs them."""
        named = self._named(tensors)

        def compiled() -> list[Tensor]:
            parameters = (_or_empty(named[name], x) for name in ("gamma", "beta"))
            residual = tf.zeros((0,), x.dtype) if named["residual"] is None else named["residual"]
            return list(
                _operations.evennorm_forward(x, *parameters, residual, keep_signs=self.keeps_signs, **self.attributes)
            )

        def composed() -> list[Tensor]:
            y, statistics = reference.forward(xp, x, **named, mask=None, **self.options)
            return [y, *statistics[1:], tf.zeros((0,), tf.uint8)]

        results = _on_cpu(compiled, composed)
        results[0].set_shape(x.shape)
        for statistic in results[1:4]:
            statistic.set_shape((x.shape[0], x.shape[2]))
        return results

    def backward(
        self, dy: Tensor, d_mean: Tensor, d_variance: Tensor, y: Tensor, saved: list[Tensor], x: Tensor, *tensors: Tensor
    ) -> list[Tensor]:
        """The derivatives by `tensors`, x the first."""
        named = self._named(tensors)
        mean, mean_low, variance, signs = saved

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
                signs,
                keep_signs=self.keeps_signs,
                **self.attributes,
            )
            return self._found(Gradients(dx, d_gamma, d_beta, d_residual if self.keeps_signs else dy))

        def composed() -> list[Tensor]:
            _, outer, _, inner = xp.shape(x)
            statistics = Moments(outer * inner, mean, mean_low, variance)
            dz, options = dy, {**self.options, "d_mean": d_mean, "d_variance": d_variance}
            if self.keeps_signs:  # known by y, so that the residual need not be kept
                dz = xp.where(y <= 0, options["negative_slope"] * dy, dy)
                options["negative_slope"] = 1.0
            inputs = {**named, "residual": None}
            g = reference.backward(xp, dz, x, statistics, **inputs, mask=None, **options)
            return self._found(g._replace(residual=dz))

        results = _on_cpu(compiled, composed)
        for result, tensor in zip(results, (x, *tensors), strict=True):
            result.set_shape(tensor.shape)
        return results

    def composed_backward(self, dy: Tensor, d_mean: Tensor, d_variance: Tensor, x: Tensor, *tensors: Tensor) -> list[Tensor]:
        """The same as functions of the inputs alone, for TensorFlow to differentiate."""
        statistics = moments(xp, reference.wide(xp, x))
        options = {**self.options, "d_mean": d_mean, "d_variance": d_variance}
        return self._found(reference.backward(xp, dy, x, statistics, **self._named(tensors), mask=None, **options))

    def _named(self, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
        return {**dict.fromkeys(OPTIONAL), **dict(zip(self.given, tensors, strict=True))}

    def _found(self, gradients: Gradients) -> list[Tensor]:
        return [gradients.x, *(getattr(gradients, name) for name in self.given)]


def _or_empty(parameter: Tensor | None, x: Tensor) -> Tensor:
    """As the operations take what is not there."""
    return tf.zeros((0,), tf.float64 if x.dtype == tf.float64 else tf.float32) if parameter is None else parameter


def _on_cpu(compiled: Callable[[], list[Tensor]], composed: Callable[[], list[Tensor]]) -> list[Tensor]:
    if tf.executing_eagerly():
        return compiled()
    return list(tf.switch_case(tf.raw_ops.DeviceIndex(device_names=["CPU"]), [compiled], composed))
