"""Compute what layers of JAX libraries have in common: from arrays and settings to the output and the new statistics."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from evennorm.core import running
from evennorm.core.geometry import Geometry, cached_geometry
from evennorm.core.moments import Moments
from evennorm.core.running import RunningMean
from evennorm.errors import ShapeError
from evennorm.jax import batch_norm, normalize
from evennorm.jax.layer_arguments import checked_momentum
from evennorm.jax.namespace import xp


class Settings(Protocol):
    """The attributes that nnx's layer and linen's have under the same names."""

    axis: Any
    momentum: float
    epsilon: float
    axis_index_groups: Any
    activation: str | None
    negative_slope: float
    virtual_batch_size: int | None
    unbiased: bool


def geometry_of(layer: Settings, x: jax.Array) -> Geometry:
    axis = layer.axis
    shape = tuple(size if isinstance(size, int) else None for size in x.shape)  # exporters replace sizes by symbols
    return cached_geometry(shape, tuple(axis) if isinstance(axis, Iterable) else axis)


def by_batch(
    layer: Settings,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    mask: Any,
    residual: Any,
    axis_name: Any,
) -> tuple[jax.Array, Moments]:
    """Normalize by the statistics of `x`, and also return these as constants (groups, channel)."""
    geometry = geometry_of(layer, x)
    y, moments = batch_norm(
        x,
        _shaped(scale, geometry),
        _shaped(bias, geometry),
        axis=geometry.axis,
        epsilon=layer.epsilon,
        mask=None if mask is None else broadcasting(mask, geometry),
        activation=layer.activation,
        negative_slope=layer.negative_slope,
        residual=residual,
        virtual_batch_size=layer.virtual_batch_size,
        axis_name=axis_name,
        axis_index_groups=None if axis_name is None else layer.axis_index_groups,
    )
    groups = 1 if layer.virtual_batch_size is None else x.shape[0] // layer.virtual_batch_size
    return y, by_channel(moments, geometry.channel, groups)


def by_running_statistics(
    layer: Settings,
    x: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    residual: Any,
) -> jax.Array:
    geometry = geometry_of(layer, x)
    return normalize(
        x,
        *(_shaped(row, geometry) for row in (mean, variance, scale, bias)),
        axis=geometry.axis,
        epsilon=layer.epsilon,
        activation=layer.activation,
        negative_slope=layer.negative_slope,
        residual=residual,
    )


def updated_stats(layer: Settings, mean: jax.Array, variance: jax.Array, moments: Moments) -> tuple[Any, Any, jax.Array]:
    """Return the running statistics after one more batch, in their shape and dtype, and whether it was accepted."""
    if isinstance(moments.count, int) and moments.count == 1:
        warnings.warn(
            "training with one value per channel: its variance is 0 and the output bias, whatever the input. The running "
            "variance is left alone; use larger batches, or use_running_average=True",
            UserWarning,
            stacklevel=3,
        )
    decay = checked_momentum(layer.momentum)
    batch = running.summary(xp, moments, layer.unbiased)
    old_mean, old_variance = (value.reshape(-1).astype(batch.mean.dtype) for value in (mean, variance))
    new_mean = running.updated_mean(xp, RunningMean(old_mean, jnp.zeros_like(old_mean)), batch, decay).mean
    new_variance = running.updated(xp, old_variance, batch.variance, decay, batch.has_variance)
    new = (value.reshape(old.shape).astype(old.dtype) for value, old in ((new_mean, mean), (new_variance, variance)))
    return *new, batch.accepted


def _shaped(parameter: jax.Array | None, geometry: Geometry) -> jax.Array | None:
    """Return a parameter, which nnx keeps flat, in the shape of the channel axes."""
    if parameter is None or parameter.shape == geometry.parameter_shape or parameter.size != geometry.channel:
        return parameter
    return parameter.reshape(geometry.parameter_shape)


def broadcasting(mask: Any, geometry: Geometry) -> jax.Array:
    """Return a mask that broadcasts against the input, as Flax's masks do, with as many axes as the input has."""
    mask = jnp.asarray(mask)
    missing = geometry.rank - mask.ndim
    aligned = zip(mask.shape, geometry.shape[max(missing, 0) :], strict=False)
    if missing < 0 or any(whole is not None and size not in (1, whole) for size, whole in aligned):
        raise ShapeError(
            f"a mask broadcasts against the input, as in Flax; received a mask of shape {mask.shape} for an input of shape "
            f"{geometry.shape}; give a mask with one value per position an axis of size 1 for each channel axis"
        )
    return mask.reshape((1,) * missing + mask.shape)


def by_channel(moments: Moments, channels: int, groups: int = 1) -> Moments:
    """Return the moments of one batch, or of its ghost batches, as constants (groups, channel)."""
    rows = (jax.lax.stop_gradient(statistic).reshape(groups, channels) for statistic in moments[1:])
    count = moments.count
    if not isinstance(count, int) and jnp.ndim(count):
        count = jnp.broadcast_to(count, moments.mean.shape).reshape(groups, channels)
    return Moments(count, *rows)
