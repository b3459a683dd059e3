"""JAX arrays in, normalized JAX arrays and their Moments out; works under jit, grad, vmap, jvp and their compositions."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np

from evennorm.core.engine import Engine
from evennorm.core.moments import Moments, count_of
from evennorm.core.namespace import Namespace
from evennorm.errors import MissingExtra
from evennorm.kernels import reference

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise MissingExtra("evennorm.jax", "jax") from error

__all__ = ["Moments", "batch_norm", "engine", "normalize"]


class _Jax:
    """`core`'s array namespace."""

    float32 = np.dtype("float32")
    float64 = np.dtype("float64")
    sums_in_a_tree = True
    reshape = staticmethod(jnp.reshape)
    transpose = staticmethod(jnp.transpose)
    broadcast_to = staticmethod(jnp.broadcast_to)
    where = staticmethod(jnp.where)
    maximum = staticmethod(jnp.maximum)
    minimum = staticmethod(jnp.minimum)
    sqrt = staticmethod(jnp.sqrt)
    isfinite = staticmethod(jnp.isfinite)
    all = staticmethod(jnp.all)
    any = staticmethod(jnp.any)
    stop_gradient = staticmethod(jax.lax.stop_gradient)

    @property
    def widest(self) -> np.dtype:
        """float64 only where the user switched it on."""
        return self.float64 if jax.config.read("jax_enable_x64") else self.float32

    @staticmethod
    def shape(x: jax.Array) -> tuple[int, ...]:
        return jnp.shape(x)

    @staticmethod
    def dtype(x: jax.Array) -> np.dtype:
        return jnp.result_type(x)

    @staticmethod
    def astype(x: Any, dtype: np.dtype) -> jax.Array:
        return jnp.asarray(x).astype(dtype)

    @staticmethod
    def asarray(value: Any, like: jax.Array) -> jax.Array:
        return jnp.asarray(value, dtype=like.dtype)

    @staticmethod
    def boolean(x: Any) -> jax.Array:
        return jnp.asarray(x, dtype=bool)

    @staticmethod
    def sum(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
        return jnp.sum(x, axis=axis)

    @staticmethod
    def rounded(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"int{8 * x.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(bits & -2, x.dtype)


xp = cast(Namespace, _Jax())


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _forward(
    x: Any, gamma: Any, beta: Any, residual: Any, mask: Any, epsilon: float, negative_slope: float
) -> tuple[Any, Any]:
    y, moments = reference.forward(xp, x, gamma, beta, residual, mask, epsilon, negative_slope)
    return y, moments[1:]


def _forward_saving(
    x: Any, gamma: Any, beta: Any, residual: Any, mask: Any, epsilon: float, negative_slope: float
) -> tuple[Any, Any]:
    y, statistics = _forward(x, gamma, beta, residual, mask, epsilon, negative_slope)
    return (y, statistics), (x, gamma, beta, residual, mask, statistics)


def _backward(epsilon: float, negative_slope: float, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    x, gamma, beta, residual, mask, statistics = saved
    dy, (_, d_mean, d_variance) = cotangents
    moments = Moments(count_of(xp, reference.wide(xp, x), mask), *statistics)
    g = reference.backward(xp, dy, x, moments, gamma, beta, residual, mask, epsilon, negative_slope, d_mean, d_variance)
    return *g, None


_forward.defvjp(_forward_saving, _backward)


def _train(
    x: Any, gamma: Any, beta: Any, residual: Any, mask: Any, epsilon: float, negative_slope: float
) -> tuple[Any, Moments]:
    y, statistics = _forward(x, gamma, beta, residual, mask, epsilon, negative_slope)
    return y, Moments(count_of(xp, reference.wide(xp, x), mask), *statistics)


engine = Engine("jax", xp, _train, partial(reference.inference, xp))
batch_norm = engine.batch_norm
normalize = engine.normalize
