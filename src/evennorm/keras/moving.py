"""Update the moving statistics of a layer from the moments of a batch, and apply batch renormalization.

Variables are read and assigned here; the formulas are those of `core.running` and `core.renorm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras import ops
from keras.src.backend.common.stateless_scope import in_stateless_scope

from evennorm.core import renorm, running
from evennorm.core.engine import Engine
from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.core.namespace import Namespace
from evennorm.keras.state import Bookkeeping

if TYPE_CHECKING:
    from evennorm.keras.layer import BatchNormalization


def update_moving_stats(layer: BatchNormalization, engine: Engine, bookkeeping: Bookkeeping, moments: Moments) -> None:
    """Update the moving statistics by one batch."""
    if not _in_place(layer, engine, bookkeeping, moments):
        _by_assignment(layer, engine.xp, bookkeeping, moments)


def _in_place(layer: BatchNormalization, engine: Engine, bookkeeping: Bookkeeping, moments: Moments) -> bool:
    """Update in one call, where the engine has one: in torch's eager mode many small operations cost more than large
    ones."""
    if layer.momentum is None or layer.renorm or in_stateless_scope():
        return False
    variables = layer.moving_mean, bookkeeping.moving_mean_low, layer.moving_variance
    running = tuple(variable.value for variable in variables)
    accepted = engine.update_running_stats(running, moments, layer.momentum, layer.unbiased_variance)
    if accepted is not None and accepted is not True:  # False, or a scalar on a device
        bookkeeping.count(accepted)
    return accepted is not None


def _by_assignment(layer: BatchNormalization, xp: Namespace, bookkeeping: Bookkeeping, moments: Moments) -> None:
    moments = Moments(moments.count, *(xp.stop_gradient(statistic) for statistic in moments[1:]))
    batch = running.summary(xp, moments, layer.unbiased_variance)
    decay = _decay(layer, xp, batch)
    _update_mean(layer.moving_mean, bookkeeping.moving_mean_low, xp, batch, decay)
    if layer.renorm:
        _update_renorm(layer, xp, batch, decay)
    else:
        _update_one(layer.moving_variance, xp, batch.variance, decay, batch.has_variance)
    bookkeeping.count(batch.accepted)


def renormalized(
    layer: BatchNormalization, xp: Namespace, xhat: Any, geometry: Geometry, moments: Moments, mask: Any = None
) -> Any:
    """Correct a normalized batch by its distance from the moving statistics, then scale and shift it."""
    batch = running.summary(xp, moments)
    mean, stddev = _flat(layer.renorm_mean, batch.mean), _flat(layer.renorm_stddev, batch.mean)
    r, d = renorm.correction(xp, batch, mean, stddev, layer.epsilon, layer.renorm_clipping or {})
    gamma, beta = (None if p is None else _flat(p, batch.mean) for p in (layer.gamma, layer.beta))
    scale, offset = renorm.effective_parameters(gamma, beta, r, d)
    wide = ops.cast(xhat, batch.mean.dtype)
    scale, offset = (ops.reshape(value, geometry.broadcast_shape) for value in (scale, offset))
    if mask is None:
        return wide * scale + offset
    # Masked values that are not finite change no derivative, not even as 0 * NaN.
    sizes = xp.shape(wide)
    counts = geometry.mask_view(xp, xp.boolean(mask), sizes)
    counts = geometry.restore(xp, xp.broadcast_to(counts, xp.shape(geometry.view(xp, wide))), sizes)
    acts = counts | xp.isfinite(wide)
    return xp.where(acts, xp.where(acts, wide, 0.0) * scale + offset, xp.stop_gradient(wide))


def _decay(layer: BatchNormalization, xp: Namespace, batch: running.Batch) -> Any:
    if layer.momentum is not None:
        return layer.momentum
    accepted = ops.cast(batch.accepted, "int32")
    before = ops.cast(layer.num_batches, batch.mean.dtype)
    layer.num_batches.assign(ops.add(layer.num_batches, accepted))
    return running.cumulative_decay(xp, before)


def _update_mean(variable: Any, low: Any, xp: Namespace, batch: running.Batch, decay: Any) -> None:
    old = running.RunningMean(_flat(variable, batch.mean), _flat(low, batch.mean))
    new = running.updated_mean(xp, old, batch, decay)
    variable.assign(ops.reshape(new.mean, variable.shape))
    low.assign(ops.reshape(new.low, low.shape))


def _update_one(variable: Any, xp: Namespace, value: Any, decay: Any, where: Any) -> Any:
    new = running.updated(xp, _flat(variable, value), value, decay, where)
    variable.assign(ops.reshape(new, variable.shape))
    return new


def _update_renorm(layer: BatchNormalization, xp: Namespace, batch: running.Batch, decay: Any) -> None:
    stddev = renorm.stddev(xp, batch, layer.epsilon)
    _update_one(layer.renorm_mean, xp, batch.mean + batch.mean_low, layer.renorm_momentum, batch.has_mean)
    _update_one(layer.renorm_stddev, xp, stddev, layer.renorm_momentum, batch.has_variance)
    new = _update_one(layer.moving_stddev, xp, stddev, decay, batch.has_variance)
    variance = ops.reshape(renorm.variance(xp, new, layer.epsilon), layer.moving_variance.shape)
    has_variance = ops.reshape(batch.has_variance, layer.moving_variance.shape)
    layer.moving_variance.assign(ops.where(has_variance, variance, ops.cast(layer.moving_variance, variance.dtype)))


def _flat(variable: Any, like: Any) -> Any:
    """Return a variable of the parameter shape as (channel,), in the precision of a statistic: float32, or float64 for
    float64 x."""
    return ops.reshape(ops.cast(variable, like.dtype), like.shape)
