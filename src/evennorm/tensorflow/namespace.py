"""Provide TensorFlow as `core`'s array namespace."""

from __future__ import annotations

from typing import Any, cast

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from evennorm.core.namespace import Namespace, Summation

Tensor = Any  # TensorFlow ships no types


def under_xla() -> bool:
    """Return whether tf.function traces for XLA. Where TensorFlow does not say so, values are the same, but slower."""
    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


class _TensorFlow:
    """`core`'s array namespace for TensorFlow."""

    float32 = tf.float32
    float64 = tf.float64
    widest = tf.float64
    reshape = staticmethod(tf.reshape)
    concatenate = staticmethod(tf.concat)
    broadcast_to = staticmethod(tf.broadcast_to)
    sqrt = staticmethod(tf.sqrt)
    isfinite = staticmethod(tf.math.is_finite)
    all = staticmethod(tf.reduce_all)
    any = staticmethod(tf.reduce_any)
    astype = staticmethod(tf.cast)
    stop_gradient = staticmethod(tf.stop_gradient)

    @property
    def summation(self) -> Summation:
        return "wide" if under_xla() else "blocks"  # blocks of 32 take twice as long under XLA

    @staticmethod
    def shape(x: Tensor) -> tuple[Any, ...]:
        known = x.shape.as_list()
        if None not in known:
            return tuple(known)
        sizes = tf.shape(x)
        return tuple(sizes[i] if size is None else size for i, size in enumerate(known))

    @staticmethod
    def dtype(x: Tensor) -> tf.DType:
        return x.dtype

    @staticmethod
    def asarray(value: Any, like: Tensor) -> Tensor:
        return tf.cast(value, like.dtype)

    @staticmethod
    def transpose(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return tf.transpose(x, axes)

    @staticmethod
    def boolean(x: Any) -> Tensor:
        return tf.cast(x, tf.bool)

    @staticmethod
    def sum(x: Tensor, axis: tuple[int, ...]) -> Tensor:
        return tf.reduce_sum(x, axis=axis)

    @staticmethod
    def where(condition: Tensor, a: Any, b: Any) -> Tensor:
        like = a if tf.is_tensor(a) else b
        return tf.where(condition, tf.cast(a, like.dtype), tf.cast(b, like.dtype))

    @staticmethod
    def leaky_relu(x: Tensor, slope: float) -> Tensor:
        return tf.nn.relu(x) if slope == 0 else tf.nn.leaky_relu(x, slope)

    relu6 = staticmethod(tf.nn.relu6)

    @staticmethod
    def maximum(a: Tensor, b: Any) -> Tensor:
        return tf.maximum(a, tf.cast(b, a.dtype))

    @staticmethod
    def minimum(a: Tensor, b: Any) -> Tensor:
        return tf.minimum(a, tf.cast(b, a.dtype))

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        bits = tf.bitcast(x, tf.int64 if x.dtype == tf.float64 else tf.int32)
        return tf.bitcast(tf.bitwise.bitwise_and(bits, tf.constant(-2, bits.dtype)), x.dtype)


xp = cast(Namespace, _TensorFlow())
