"""TensorFlow tensors in, normalized tensors and their Moments out; works eagerly, in tf.function and under XLA."""

from __future__ import annotations

from typing import Any, cast

from evennorm.core.engine import Engine
from evennorm.core.moments import Moments, count_of, per_channel, pool
from evennorm.core.moments import moments as core_moments
from evennorm.core.namespace import Namespace
from evennorm.core.normalize import activate
from evennorm.errors import MissingExtra
from evennorm.kernels import choose, reference

try:
    import tensorflow as tf
except ImportError as error:
    raise MissingExtra("evennorm.tensorflow", "tensorflow") from error

__all__ = ["Moments", "batch_norm", "engine", "normalize", "synchronized"]

Tensor = Any  # TensorFlow ships no types


class _TensorFlow:
    """`core`'s array namespace."""

    float32 = tf.float32
    float64 = tf.float64
    widest = tf.float64
    sums_in_a_tree = False
    reshape = staticmethod(tf.reshape)
    broadcast_to = staticmethod(tf.broadcast_to)
    sqrt = staticmethod(tf.sqrt)
    isfinite = staticmethod(tf.math.is_finite)
    all = staticmethod(tf.reduce_all)
    any = staticmethod(tf.reduce_any)
    astype = staticmethod(tf.cast)
    stop_gradient = staticmethod(tf.stop_gradient)

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


def _train(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> tuple[Tensor, Moments]:
    optional = {"gamma": gamma, "beta": beta, "residual": residual}
    given = [name for name, tensor in optional.items() if tensor is not None]

    @tf.custom_gradient
    def differentiable(x: Tensor, *tensors: Tensor) -> Any:
        inputs = {**dict.fromkeys(optional), **dict(zip(given, tensors, strict=True))}
        y, moments = reference.forward(xp, x, mask=mask, epsilon=epsilon, negative_slope=negative_slope, **inputs)

        def gradient(dy: Tensor, _: Tensor, d_mean: Tensor, d_variance: Tensor) -> list[Tensor]:
            g = reference.backward(
                xp,
                dy,
                x,
                moments,
                mask=mask,
                epsilon=epsilon,
                negative_slope=negative_slope,
                d_mean=d_mean,
                d_variance=d_variance,
                **inputs,
            )
            return [g.x, *(getattr(g, name) for name in given)]

        return (y, *moments[1:]), gradient

    y, *statistics = differentiable(x, *(optional[name] for name in given))
    return y, Moments(count_of(xp, reference.wide(xp, x), mask), *statistics)


def _inference(
    x: Tensor,
    statistics: Moments,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> Tensor:
    _, _, channel, inner = xp.shape(x)
    if choose("tensorflow", x.dtype.name, training=False, inner=inner, epsilon=epsilon) == "reference":
        return reference.inference(xp, x, statistics, gamma, beta, residual, epsilon, negative_slope)
    # XLA turns the op into x * scale + offset, which cancels at large means, unless the mean is gone before.
    centred = reference.wide(xp, x) - per_channel(xp, statistics.mean)
    y, *_ = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(centred, (-1, 1, 1, channel)),
        scale=tf.ones((channel,)) if gamma is None else gamma,
        offset=tf.zeros((channel,)) if beta is None else beta,
        mean=tf.zeros((channel,)),
        variance=tf.reshape(statistics.variance, (channel,)),
        epsilon=epsilon,
        is_training=False,
    )
    y = tf.reshape(y, xp.shape(x))
    if residual is not None:
        y = y + reference.wide(xp, residual)
    return xp.astype(activate(xp, y, negative_slope), x.dtype)


def _train_synchronized(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> tuple[Tensor, Moments]:
    """Differentiated by TensorFlow itself, so that the exchanges between replicas are too."""
    moments = core_moments(xp, reference.wide(xp, x), mask)
    replica = tf.distribute.get_replica_context()
    if replica is not None and replica.num_replicas_in_sync > 1:
        moments = pool(xp, moments, lambda value: replica.all_reduce(tf.distribute.ReduceOp.SUM, value))
    return reference.inference(xp, x, moments, gamma, beta, residual, epsilon, negative_slope), moments


engine = Engine("tensorflow", xp, _train, _inference)
synchronized = Engine("tensorflow", xp, _train_synchronized, _inference)
"""The same with statistics taken over all replicas of the current tf.distribute strategy."""
batch_norm = engine.batch_norm
normalize = engine.normalize
