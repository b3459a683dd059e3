"""Provide flax.nnx.BatchNorm with the same arguments, state and numbers, and additions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import reprlib
from flax.nnx.nn import dtypes

from evennorm.core.call import refuse_complex
from evennorm.core.moments import Moments
from evennorm.errors import ArgumentError, ShapeError
from evennorm.jax import layer_arguments
from evennorm.jax.layers import by_batch, by_running_statistics, geometry_of, updated_stats
from evennorm.kernels import choose


class BatchNorm(nnx.BatchNorm):
    """Normalization of each channel over the batch, then a scale and an offset: flax.nnx.BatchNorm, and more.

        y = activation(scale * (x - mean) / sqrt(variance + epsilon) + bias [+ residual])

    Where running averages are not used, mean and variance are those of the batch, and the running ones follow them:
    `running = momentum * running + (1 - momentum) * batch`. Variables, their names and types are those of Flax's layer, and
    so is the state, in both directions. Statistics are exact at any mean, where those of Flax's layer are differences of
    large numbers. `train()`, `eval()`, `nnx.view` and all transforms work as on any module.

    Args:
        num_features: the number of channels; with several channel axes the product of their sizes.
        activation: None, "relu", "relu6" or "leaky_relu" (of `negative_slope` below zero), applied last.
        virtual_batch_size: samples per ghost batch, each normalized by its own statistics (Hoffer et al. 2017).
        unbiased: let the running variance follow variance * n / (n - 1), as PyTorch does.
        **others: those of flax.nnx.BatchNorm, which mean the same here: use_running_average, axis, momentum, epsilon, dtype,
            param_dtype, use_bias, use_scale, bias_init, scale_init, axis_name, axis_index_groups, promote_dtype, rngs,
            bias_metadata, scale_metadata; use_fast_variance is taken, and changes nothing.

    Call arguments:
        x: an array of real numbers of any rank.
        use_running_average: takes precedence over the attribute.
        mask: true where a value counts; it broadcasts against x. Masked values are normalized, but act on no statistic.
        residual: an array like x, added before the activation.

    A batch that would poison the running statistics (NaN or infinity in any channel, no values, everything masked) leaves
    them as they were. No variable counts them, since Flax's layer has none: `nnx.capture` of nnx.Intermediate tells of each
    batch, under the name `refused`. With one value per channel a warning says so, and the running variance stays.

    Raises:
        ArgumentError: a value outside its range, complex numbers, no use_running_average.
        ShapeError: an axis, a mask or a residual that does not fit; another number of channels than num_features.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167; arguments after flax.nnx.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from evennorm.flax import BatchNorm
        >>> norm = BatchNorm(1, epsilon=0.0, momentum=0.5, activation="relu", rngs=nnx.Rngs(0))
        >>> norm(jnp.array([[1.0], [3.0]])).ravel().tolist(), norm.mean[...].tolist()
        ([0.0, 1.0], [1.0])
    """

    def __init__(
        self,
        num_features: int,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        virtual_batch_size: int | None = None,
        unbiased: bool = False,
        **others: Any,
    ):
        super().__init__(num_features, **others)
        self._configure(activation, negative_slope, virtual_batch_size, unbiased)

    def _configure(
        self,
        activation: str | None = None,
        negative_slope: float = 0.01,
        virtual_batch_size: int | None = None,
        unbiased: bool = False,
    ) -> None:
        """Set what Flax's layer does not have."""
        layer_arguments.check(self.momentum, self.epsilon, activation, negative_slope, virtual_batch_size)
        self.activation = activation
        self.negative_slope = negative_slope
        self.virtual_batch_size = virtual_batch_size
        self.unbiased = unbiased

    def __call__(
        self, x: Any, use_running_average: bool | None = None, *, mask: Any = None, residual: Any = None
    ) -> jax.Array:
        given = self.use_running_average if use_running_average is None else use_running_average
        if given is None:
            raise ArgumentError(
                "use_running_average says which statistics to use, and neither the module nor the call has it; give it to "
                "one of them, or call train() or eval()"
            )
        refuse_complex(x=x)
        x, mean, variance, scale, bias = self._promoted(x)
        self._check_channels(x)
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        if given:
            y = by_running_statistics(self, x, mean, variance, scale, bias, residual=residual)
        else:
            y, moments = by_batch(self, x, scale, bias, mask=mask, residual=residual, axis_name=self.axis_name)
            self._follow(moments)
        return jnp.asarray(y, dtype)

    def _promoted(self, x: Any) -> tuple[Any, ...]:
        """Return x, running mean and variance, scale and bias in the dtypes that `promote_dtype` gives them.

        Flax's own casts all to the dtype of the result. That of x is its meaning; the others stay as they are stored, since
        the kernels compute in float32 at least, and a mean of 1000.5 in bfloat16 would be another one.
        """
        rows = (None if row is None else row[...] for row in (self.mean, self.var, self.scale, self.bias))
        stored = x, *rows
        promoted = self.promote_dtype(stored, dtype=self.dtype)
        return (promoted[0], *stored[1:]) if self.promote_dtype is dtypes.promote_dtype else promoted

    def _check_channels(self, x: jax.Array) -> None:
        geometry = geometry_of(self, x)
        if geometry.channel != self.num_features:
            raise ShapeError(
                f"num_features is the number of channels, {geometry.channel} for an input of shape {x.shape} with "
                f"axis={self.axis}; received num_features={self.num_features}; give that number or another axis"
            )

    def _follow(self, moments: Moments) -> None:
        self.mean[...], self.var[...], accepted = updated_stats(self, self.mean[...], self.var[...], moments)
        if hasattr(self, "__captures__"):  # elsewhere `sow` would make it a variable of the module
            self.sow(nnx.Intermediate, "refused", ~accepted)

    def __nnx_repr__(self) -> Iterator[Any]:
        yield from super().__nnx_repr__()
        dtype = jnp.dtype(jnp.float32 if self.dtype is None else self.dtype).name
        yield reprlib.Attr("kernel", choose("jax", dtype, training=True))
