"""Normalize by the statistics of all replicas of a tf.distribute strategy: one exchange forward, one backward.

Rows are gathered by a sum of buffers that hold one row each; a sum of a number and zeros is exact. `all_gather` would be
two exchanges, of sizes and of values.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from evennorm.core.call import Call
from evennorm.core.exchange import local_derivatives, merged, packed
from evennorm.core.moments import Moments, moments
from evennorm.core.normalize import Gradients, dz_of, gradient_sums, input_gradient, parameter_gradients
from evennorm.errors import ArgumentError
from evennorm.kernels import reference
from evennorm.tensorflow.composed import OPTIONAL
from evennorm.tensorflow.namespace import Tensor, under_xla, xp


def number() -> int:
    """Return the number of replicas of the current strategy."""
    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def several() -> bool:
    """Return whether this is one of several replicas, which have something to exchange."""
    replica = tf.distribute.get_replica_context()
    return replica is not None and replica.num_replicas_in_sync > 1


@tf.autograph.experimental.do_not_convert
def train(
    call: Call,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Moments]:
    """Compute `composed.train` by the moments of all replicas; each gets the gradient of the sum of all losses.

    Raises:
        ArgumentError: ghost batches, or a program that XLA compiles for a CPU.
    """
    _check(call)
    optional = dict(zip(OPTIONAL, (gamma, beta, residual), strict=True))
    given = [name for name, tensor in optional.items() if tensor is not None]
    whole = exchanged(moments(xp, reference.wide(xp, x), mask))

    @tf.custom_gradient
    def differentiable(x: Tensor, *tensors: Tensor) -> Any:
        inputs = {**dict.fromkeys(OPTIONAL), **dict(zip(given, tensors, strict=True))}

        def gradient(dy: Tensor) -> list[Tensor]:
            g = _gradients(call, dy, x, whole, **inputs, mask=mask)
            return [g.x, *(getattr(g, name) for name in given)]

        return reference.infer(xp, call, x, whole, **inputs), gradient

    return differentiable(x, *(optional[name] for name in given)), whole


def _gradients(
    call: Call,
    dy: Tensor,
    x: Tensor,
    whole: Moments,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> Gradients:
    """Compute `reference.backward` with the sums of all replicas; the derivatives by gamma and beta are those of this one's
    part."""
    numbers = call.epsilon, call.activation
    wide_residual = None if residual is None else reference.wide(xp, residual)
    wide_dy, wide_x = reference.wide(xp, dy), reference.wide(xp, x)
    dz, wide_x = dz_of(xp, wide_dy, wide_x, whole, gamma, beta, *numbers, wide_residual, mask)
    own = gradient_sums(xp, dz, wide_x, whole)
    d_gamma, d_beta = parameter_gradients(xp, *own, whole, call.epsilon, gamma is not None, beta is not None)
    sum_dz, sum_dz_centred = _sums(*own)
    dx = input_gradient(xp, dz, wide_x, whole, gamma, call.epsilon, sum_dz, sum_dz_centred, mask)
    d_residual = None if residual is None else tf.cast(dz, residual.dtype)
    return Gradients(tf.cast(dx, x.dtype), d_gamma, d_beta, d_residual)


def exchanged(local: Moments) -> Moments:
    """Return the moments of all replicas, with derivatives by those of this one."""
    groups, channel = xp.shape(local.mean)

    @tf.custom_gradient
    def differentiable(mean_low: Tensor, variance: Tensor) -> Any:
        own = local._replace(mean_low=mean_low, variance=variance)
        whole = merged(xp, _all_rows(packed(xp, own)), groups, channel)

        def gradient(_: Tensor, __: Tensor, d_mean: Tensor, d_variance: Tensor) -> Any:
            return local_derivatives(xp, own, whole, *_sums(d_mean, d_variance))

        return tuple(whole), gradient

    return Moments(*differentiable(local.mean_low, local.variance))


def _all_rows(row: Tensor) -> Tensor:
    """Return the rows of all replicas, (replica, ...), in the same order on each."""
    replica = tf.distribute.get_replica_context()
    own = tf.range(replica.num_replicas_in_sync) == replica.replica_id_in_sync_group
    return _all_sum(tf.where(own[:, None], row[None], tf.zeros_like(row)[None]))  # not a product: 0 * NaN is NaN


def _sums(*rows: Tensor) -> list[Tensor]:
    """Add rows (groups, channel) over all replicas, in one exchange."""
    return list(tf.unstack(_all_sum(tf.stack(rows)), len(rows)))


def _all_sum(value: Tensor) -> Tensor:
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def _check(call: Call) -> None:
    if call.group_size is not None:
        raise ArgumentError(
            "statistics are taken over ghost batches or over all replicas; received virtual_batch_size="
            f"{call.group_size} with synchronized statistics; drop one"
        )
    devices = tf.distribute.get_strategy().extended.worker_devices
    if under_xla() and any("CPU" in device for device in devices):
        raise ArgumentError(
            f"statistics of {len(devices)} devices are exchanged by collectives, which XLA has for GPUs and TPUs; received "
            f"a program that it compiles for {devices[0]}; leave out jit_compile=True"
        )
