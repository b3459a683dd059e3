"""Normalize JAX arrays, under jit, grad, vmap, jvp and their compositions."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from evennorm.core.call import Call, refuse_complex
from evennorm.core.engine import Engine
from evennorm.core.moments import Moments, count_of
from evennorm.errors import ArgumentError, MissingExtra
from evennorm.kernels import choose, reference

try:
    import jax
except ImportError as error:
    raise MissingExtra("evennorm.jax", "jax", error.name) from error

from evennorm.jax import lowering, partitioned, synchronized
from evennorm.jax.composed import Options
from evennorm.jax.devices import AxisName, Devices
from evennorm.jax.memory import KeptMemory, keep_memory, memory_kept
from evennorm.jax.meshes import explicit_mesh, trained_by_xla
from evennorm.jax.namespace import xp
from evennorm.jax.primitives import STATISTICS, backward_p, forward_p
from evennorm.jax.varying import all_varying

__all__ = ["KeptMemory", "Moments", "batch_norm", "engine", "keep_memory", "memory_kept", "normalize"]


def __dir__() -> list[str]:
    """Return the names of the public API."""
    return sorted(__all__)


lowering.register()


def _train(
    call: Call, x: Any, gamma: Any, beta: Any, residual: Any, mask: Any, devices: Devices | None = None
) -> tuple[Any, Moments]:
    wide = reference.wide(xp, x)
    gamma, beta = (None if p is None else xp.astype(p, wide.dtype) for p in (gamma, beta))
    residual = None if residual is None else xp.astype(residual, x.dtype)
    given = {"x": x, "gamma": gamma, "beta": beta, "residual": residual, "mask": mask}
    arrays = all_varying({name: a for name, a in given.items() if a is not None})
    options = Options(call.epsilon, call.activation, choose("jax", x.dtype.name, training=True))
    if devices is not None and devices.number > 1:
        return synchronized.train(devices, options, arrays)
    if options.kernel == "cpu":
        partitioned.ask_for_devices(forward_p, backward_p)
    y, *statistics = forward_p.bind(
        *arrays.values(), given=tuple(arrays), linear=(), options=options, wanted=("y", *STATISTICS)
    )
    moments = Moments(count_of(xp, wide, mask), *statistics)
    return y, moments if devices is None else devices.alike(moments)


class _JaxEngine(Engine):
    def train(
        self,
        call: Call,
        x: Any,
        gamma: Any,
        beta: Any,
        *,
        mask: Any = None,
        residual: Any = None,
        grouped: bool = True,
    ) -> tuple[Any, Moments]:
        run = partial(super().train, call, grouped=grouped)
        arrays = {"x": x, "gamma": gamma, "beta": beta, "mask": mask, "residual": residual}
        mesh = explicit_mesh(arrays.values())
        return run(**arrays) if mesh is None else trained_by_xla(run, call, grouped, mesh, arrays)

    def at_hand(self, value: jax.Array) -> np.ndarray | None:
        known = not isinstance(value, jax.core.Tracer) and all(device.platform == "cpu" for device in value.devices())
        return np.asarray(value) if known and value.is_fully_addressable else None


engine = _JaxEngine("jax", xp, _train)
normalize = engine.normalize


def batch_norm(
    x: jax.Array,
    gamma: jax.Array | None = None,
    beta: jax.Array | None = None,
    *,
    axis: int | Iterable[int] = -1,
    epsilon: float = 1e-5,
    mask: jax.Array | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: jax.Array | None = None,
    virtual_batch_size: int | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Iterable[Iterable[int]] | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalize `x` by its own statistics, or by those of the whole batch that devices hold parts of.

        y = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta [+ residual])

    Args:
        x: an array of any shape with at least one axis; float16, bfloat16, float32 or float64.
        gamma, beta: scale and offset of the parameter shape, the sizes of the channel axes; None for 1 and 0.
        axis: the channel axis, or several; all others are averaged over.
        epsilon: added to the variance; 0 or more.
        mask: true where a value counts; its axes are those that are averaged over, or it broadcasts against `x`.
        activation: None, "relu", "relu6" or "leaky_relu" (of `negative_slope` below zero).
        residual: an array like `x`, added before the activation.
        virtual_batch_size: samples per ghost batch, each with statistics of its own; divides the first axis.
        axis_name: the axis of pmap, shard_map or vmap, or several, over whose devices the statistics are taken. They
            exchange 3 numbers per channel and the count; in the derivative, 2 per channel.
        axis_index_groups: groups of one size of these devices, which take their statistics without the others.

    Returns:
        y, of x's shape and dtype, and the `Moments` of the parameter shape (with a leading axis more for ghost batches), the
        same on all devices that exchange; variance is the biased one, and mean + mean_low the mean.

    Raises:
        ShapeError: axis, mask, parameters or residual do not fit `x`.
        ArgumentError: an unknown activation, a negative epsilon, complex numbers; an axis that nothing binds, groups that do
            not divide its devices, or ghost batches together with an axis.

    Warns:
        RuntimeWarning: finite values have a variance beyond the range of their precision; y is beta there. Said on the CPU,
            and not in a program that is traced or compiled.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 1; the exchange is that of `evennorm.core.exchange`.

    Example:
        >>> import jax
        >>> from evennorm.jax import batch_norm
        >>> parts = jax.numpy.array([[[1.0], [3.0]], [[5.0], [7.0]]])
        >>> y, moments = jax.vmap(lambda x: batch_norm(x, axis_name="devices"), axis_name="devices")(parts)
        >>> moments.mean.tolist(), moments.variance.tolist()
        ([[4.0], [4.0]], [[5.0], [5.0]])
    """
    refuse_complex(x=x, gamma=gamma, beta=beta, residual=residual)
    call = engine._call(x, axis, epsilon, activation, negative_slope, virtual_batch_size)
    devices = _devices(axis_name, axis_index_groups, virtual_batch_size)
    chosen = engine if devices is None else _JaxEngine("jax", xp, partial(_train, devices=devices))
    y, moments = chosen.train(call, x, gamma, beta, mask=mask, residual=residual, grouped=False)
    chosen.warn_of_range(moments, stacklevel=3)
    return y, moments


def _devices(axis_name: AxisName | None, groups: Any, virtual_batch_size: int | None) -> Devices | None:
    if axis_name is None:
        if groups is not None:
            raise ArgumentError(
                f"axis_index_groups divides the devices of an axis; received {groups!r} without an axis; give axis_name"
            )
        return None
    if virtual_batch_size is not None:
        raise ArgumentError(
            "axis_name takes statistics over several devices, virtual_batch_size over a part of one's batch; received "
            f"axis_name={axis_name!r} and virtual_batch_size={virtual_batch_size}; drop one, or group devices by "
            "axis_index_groups"
        )
    return Devices.named(axis_name, groups)
