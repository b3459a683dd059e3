"""Provide equinox.nn.BatchNorm with the same arguments and state, and additions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from evennorm.core import running
from evennorm.core.call import refuse_complex
from evennorm.errors import ArgumentError, MissingExtra, ShapeError
from evennorm.jax import batch_norm, layer_arguments, normalize
from evennorm.jax.layers import by_channel
from evennorm.jax.namespace import xp

try:
    import equinox as eqx
except ImportError as error:
    raise MissingExtra("evennorm.equinox", "equinox", error.name) from error

__all__ = ["BatchNorm"]


def __dir__() -> list[str]:
    """Return the names of the public API."""
    return sorted(__all__)


class BatchNorm(eqx.nn.BatchNorm):
    """Normalization of each channel over the batch: equinox.nn.BatchNorm with mode="batch", and more.

        y = activation(weight * (x - mean) / sqrt(variance + eps) + bias [+ residual])

    It is called on one sample (input_size, ...) under `jax.vmap`, `jax.pmap` or `jax.shard_map` with `axis_name`, as
    Equinox's layer is, and holds the same arrays and state. Batches with NaN or infinity leave the state alone, and so do
    batches of one value per channel. Two things differ: the moving variance starts at 0 and not at 1, so that dividing it
    by 1 - momentum^n gives the average of the variances seen; and before the first batch inference takes mean 0, variance 1.

    Args:
        activation: None, "relu", "relu6" or "leaky_relu", computed in the same pass.
        negative_slope: that of "leaky_relu".
        **others: those of equinox.nn.BatchNorm, which mean the same here; mode is "batch".

    Call arguments:
        x, state, key, inference: as in Equinox.
        residual: an array like x, added before the activation.

    Raises:
        ArgumentError: a value outside its range, mode="ema", complex numbers.
        ShapeError: an input without `input_size` channels.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from evennorm.equinox import BatchNorm
        >>> norm, state = eqx.nn.make_with_state(BatchNorm)(1, "batch", eps=0.0, activation="relu")
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, state = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        >>> y.ravel().tolist()
        [0.0, 1.0]
    """

    activation: str | None = eqx.field(static=True)
    negative_slope: float = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: Hashable | Sequence[Hashable],
        eps: float = 1e-5,
        channelwise_affine: bool = True,
        momentum: float = 0.99,
        inference: bool = False,
        dtype: Any = None,
        mode: str = "batch",
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ):
        layer_arguments.check(momentum, eps, activation, negative_slope)
        if mode != "batch":
            raise ArgumentError(
                'this layer normalizes by the statistics of the batch, mode="batch"; received '
                f'mode={mode!r}; equinox.nn.BatchNorm has mode="ema", which normalizes by running statistics in training'
            )
        super().__init__(input_size, axis_name, eps, channelwise_affine, momentum, inference, dtype, mode="batch")
        zeros = jnp.zeros_like(self.batch_state_index.init[0])
        self.batch_state_index: Any = eqx.nn.StateIndex((zeros, zeros))
        self.activation, self.negative_slope = activation, negative_slope

    def __call__(
        self, x: jax.Array, state: Any, *, key: Any = None, inference: bool | None = None, residual: Any = None
    ) -> tuple[jax.Array, Any]:
        refuse_complex(x=x)
        if x.ndim < 1 or x.shape[0] != self.input_size:
            raise ShapeError(f"an input is (input_size, ...) with input_size={self.input_size}; received {x.shape}")
        options: dict[str, Any] = {
            "axis": 0,
            "epsilon": self.eps,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
        }
        count, (mean, variance) = state.get(self.batch_counter), state.get(self.batch_state_index)
        if self.inference if inference is None else inference:
            weight = 1 - self.momentum ** jnp.maximum(count, 1)
            seen = jnp.where(count == 0, 0.0, mean / weight), jnp.where(count == 0, 1.0, variance / weight)
            return normalize(x, *seen, self.weight, self.bias, residual=residual, **options), state
        y, moments = batch_norm(x, self.weight, self.bias, residual=residual, axis_name=self.axis_name, **options)
        batch = running.summary(xp, by_channel(moments, self.input_size))
        moved = jnp.all(batch.has_variance)
        new = [
            running.updated(xp, old, value.astype(old.dtype), self.momentum, moved)
            for old, value in ((mean, batch.mean + batch.mean_low), (variance, batch.variance))
        ]
        return y, state.set(self.batch_counter, count + moved).set(self.batch_state_index, tuple(new))
