"""Provide flax.linen.BatchNorm with the same fields, variables and numbers, and additions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes

from evennorm.core.call import refuse_complex
from evennorm.jax import layer_arguments
from evennorm.jax.layers import by_batch, by_running_statistics, geometry_of, updated_stats

__all__ = ["BatchNorm"]


class BatchNorm(nn.BatchNorm):
    """Normalization of each channel over the batch, then a scale and an offset: flax.linen.BatchNorm, and more.

        y = activation(scale * (x - mean) / sqrt(variance + epsilon) + bias [+ residual])

    Fields, collections, variables and the name that a parent gives the layer are those of Flax's, so that the variables of
    one are those of the other. What differs from Flax's layer is said of `evennorm.flax.BatchNorm`.

    Args:
        activation, negative_slope, virtual_batch_size, unbiased: as in `evennorm.flax.BatchNorm`.
        **others: the fields of flax.linen.BatchNorm, which mean the same here; use_fast_variance changes nothing, and
            force_float32_reductions only the dtype of the running statistics.

    Call arguments:
        x, use_running_average, mask: as in Flax.
        residual: an array like x, added before the activation.

    Refused batches are reported where the collection "intermediates" is mutable, under the name `refused`.

    Raises:
        ArgumentError: a value outside its range, complex numbers.
        ShapeError: an axis, a mask or a residual that does not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from evennorm.flax.linen import BatchNorm
        >>> norm = BatchNorm(use_running_average=False, epsilon=0.0, momentum=0.5, activation="relu")
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, changed = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
        >>> y.ravel().tolist(), changed["batch_stats"]["mean"].tolist()
        ([0.0, 1.0], [1.0])
    """

    activation: str | None = None
    negative_slope: float = 0.01
    virtual_batch_size: int | None = None
    unbiased: bool = False

    @nn.compact
    def __call__(
        self, x: Any, use_running_average: bool | None = None, *, mask: Any = None, residual: Any = None
    ) -> jax.Array:
        by_running = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        layer_arguments.check(self.momentum, self.epsilon, self.activation, self.negative_slope, self.virtual_batch_size)
        refuse_complex(x=x)
        x = jnp.asarray(x)
        shape = geometry_of(self, x).parameter_shape
        statistics_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, statistics_dtype)
        variance = self.variable("batch_stats", "var", jnp.ones, shape, statistics_dtype)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        x = x.astype(jnp.promote_types(dtypes.canonicalize_dtype(x), dtype))
        if by_running:
            y = by_running_statistics(self, x, mean.value, variance.value, scale, bias, residual=residual)
        else:
            starting = self.is_initializing()  # when no axis needs a name, and nothing moves
            axis_name = None if starting else self.axis_name
            y, moments = by_batch(self, x, scale, bias, mask=mask, residual=residual, axis_name=axis_name)
            if not starting:
                mean.value, variance.value, accepted = updated_stats(self, mean.value, variance.value, moments)
                self.sow("intermediates", "refused", ~accepted)
        return jnp.asarray(y, dtype)
