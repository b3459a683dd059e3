"""Describe along which axes of the mesh arrays under shard_map differ, which JAX keeps in their types."""

from __future__ import annotations

import jax


def all_varying(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return parameters that the devices share as arrays of each device, whose derivatives JAX then adds up."""
    axes = {name: varying_axes(a) for name, a in arrays.items()}
    together = frozenset().union(*axes.values())
    return {name: _varying(a, tuple(together - axes[name])) for name, a in arrays.items()}


def varying_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Return `x` as an array that differs wherever `other` does."""
    return _varying(x, tuple(varying_axes(other) - varying_axes(x)))


def varying_axes(x: jax.Array | int) -> frozenset[str]:
    """Return the axes along which `x` may differ; none outside shard_map, or where it is told not to check."""
    kind = jax.typeof(x)  # renamed in JAX 0.10
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def _varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    if not axes:
        return x
    return jax.lax.pcast(x, axes, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, axes)
