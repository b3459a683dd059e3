"""Provide JAX as `core`'s array namespace."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from evennorm.core.namespace import Namespace, Summation


class _Jax:
    """`core`'s array namespace for JAX."""

    float32 = np.dtype("float32")
    float64 = np.dtype("float64")
    summation: Summation = "tree"
    reshape = staticmethod(jnp.reshape)
    transpose = staticmethod(jnp.transpose)
    broadcast_to = staticmethod(jnp.broadcast_to)
    concatenate = staticmethod(jnp.concatenate)
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
        """float64 only where the user enabled it."""
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
    def leaky_relu(x: jax.Array, slope: float) -> jax.Array:
        return jnp.where(x <= 0, 0.0 if slope == 0 else slope * x, x)

    @staticmethod
    def relu6(x: jax.Array) -> jax.Array:
        return jnp.where(x <= 0, 0.0, jnp.where(x >= 6, 6.0, x))  # not jax.nn.relu6, whose derivative at both ends is 1/2

    @staticmethod
    def rounded(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"int{8 * x.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(bits & -2, x.dtype)


xp = cast(Namespace, _Jax())
