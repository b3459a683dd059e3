"""Provide haiku.BatchNorm with the same arguments, parameters and state, and additions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from evennorm.core import running
from evennorm.core.activation import activate, activation_of
from evennorm.core.call import refuse_complex
from evennorm.core.geometry import cached_geometry
from evennorm.errors import ArgumentError, MissingExtra
from evennorm.jax import batch_norm, layer_arguments, normalize
from evennorm.jax.layers import by_channel
from evennorm.jax.namespace import xp

try:
    import haiku as hk
except ImportError as error:
    raise MissingExtra("evennorm.haiku", "haiku", error.name) from error

__all__ = ["BatchNorm"]


def __dir__() -> list[str]:
    """Return the names of the public API."""
    return sorted(__all__)


class _Average(hk.ExponentialMovingAverage):
    """Haiku's moving average, which leaves its state alone where a batch is refused."""

    def update(self, value: jax.Array, accepted: jax.Array) -> None:
        counter = hk.get_state("counter", (), jnp.int32, init=jnp.zeros)
        hidden = hk.get_state("hidden", value.shape, value.dtype, init=jnp.zeros)
        average = hk.get_state("average", value.shape, value.dtype, init=jnp.zeros)
        new = running.updated(xp, hidden, value, self.decay, accepted)
        hk.set_state("counter", counter + accepted)
        hk.set_state("hidden", new)
        weight = 1 - jnp.power(jnp.asarray(self.decay, value.dtype), counter + 1)
        hk.set_state("average", jnp.where(accepted, new / weight, average))


class BatchNorm(hk.BatchNorm):
    """Normalization of each channel over the batch: haiku.BatchNorm, and more.

        y = activation(scale * (x - mean) / sqrt(variance + eps) + offset [+ residual])

    Parameters, state and their names are those of Haiku's module. Variances are exact at large means, where Haiku's
    are a difference of squares; batches with NaN or infinity, and those of one value per channel, leave the state alone.

    Args:
        activation: None, "relu", "relu6" or "leaky_relu", computed in the same pass.
        negative_slope: that of "leaky_relu".
        **others: those of haiku.BatchNorm, which mean the same here.

    Call arguments:
        inputs, is_training, test_local_stats, scale, offset: as in Haiku.
        residual, mask: as in `evennorm.jax.batch_norm`; the mask is for training.

    Raises:
        ArgumentError: a value outside its range, complex numbers.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp
        >>> from evennorm.haiku import BatchNorm
        >>> norm = lambda x: BatchNorm(True, True, 0.9, eps=0.0, activation="relu")(x, is_training=True)
        >>> net = hk.transform_with_state(norm)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, state = net.apply(*net.init(None, x), None, x)
        >>> y.ravel().tolist()
        [0.0, 1.0]
    """

    def __init__(self, *args: Any, activation: str | None = None, negative_slope: float = 0.01, **others: Any):
        super().__init__(*args, **others)
        decay = self.mean_ema.decay
        layer_arguments.check(decay, self.eps, activation, negative_slope)
        self.activation, self.negative_slope = activation, negative_slope
        for average in (self.mean_ema, self.var_ema):
            average.__class__ = _Average  # one made anew would be called mean_ema_1

    def __call__(
        self,
        inputs: jax.Array,
        is_training: bool,
        test_local_stats: bool = False,
        scale: Any = None,
        offset: Any = None,
        *,
        residual: Any = None,
        mask: Any = None,
    ) -> jax.Array:
        refuse_complex(inputs=inputs)
        geometry = cached_geometry(inputs.shape, self._channels(inputs.ndim))
        kept, shape = geometry.broadcast_shape, geometry.parameter_shape
        made: list[Any] = []
        for name, created, given, init in (
            ("scale", self.create_scale, scale, self.scale_init),
            ("offset", self.create_offset, offset, self.offset_init),
        ):
            if created and given is not None:
                raise ArgumentError(f"a module takes no {name} that creates its own; received both; use create_{name}=False")
            made.append(hk.get_parameter(name, kept, inputs.dtype, init).reshape(shape) if created else None)
        given_now = scale is not None or offset is not None  # which may differ from sample to sample
        options: dict[str, Any] = {"axis": geometry.axis, "epsilon": self.eps}
        if not given_now:
            options |= {"activation": self.activation, "negative_slope": self.negative_slope, "residual": residual}
        if is_training or test_local_stats:
            names: dict[str, Any] = {
                "axis_name": self.cross_replica_axis,
                "axis_index_groups": self.cross_replica_axis_index_groups,
            }
            y, moments = batch_norm(
                inputs, made[0], made[1], mask=mask, **options, **(names if self.cross_replica_axis else {})
            )
            if is_training:
                batch = running.summary(xp, by_channel(moments, geometry.channel))
                accepted = jnp.all(batch.has_variance)
                self.mean_ema.update((batch.mean + batch.mean_low).reshape(kept).astype(inputs.dtype), accepted)
                self.var_ema.update(batch.variance.reshape(kept).astype(inputs.dtype), accepted)
        else:
            averages = (ema.average.reshape(shape) for ema in (self.mean_ema, self.var_ema))
            y = normalize(inputs, *averages, *made, **options)
        if not given_now:
            return y
        y = y * (1 if scale is None else scale) + (0 if offset is None else offset) + (0 if residual is None else residual)
        return activate(xp, y, activation_of(self.activation, self.negative_slope)).astype(inputs.dtype)

    def _channels(self, rank: int) -> tuple[int, ...]:
        """Return the axes of the channels; `axis` of Haiku names all others."""
        if self.axis is None:
            return (self.channel_index,)
        return tuple(sorted(set(range(rank)) - {axis % rank for axis in self.axis}))
