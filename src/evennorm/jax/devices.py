"""Exchange rows of numbers between the devices of a named axis."""

from __future__ import annotations

from collections.abc import Hashable
from inspect import signature
from math import prod
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evennorm.errors import ArgumentError
from evennorm.jax.varying import varying_axes

AxisName = Hashable | tuple[Hashable, ...]


class Devices(NamedTuple):
    """The devices that share their statistics: those along an axis, or within a group of them."""

    names: tuple[Hashable, ...]
    groups: tuple[tuple[int, ...], ...] | None = None
    by_vmap: bool = False
    """Whether vmap binds one of the names: its collectives know no groups, and gather along one axis at a time."""

    @classmethod
    def named(cls, axis_name: AxisName, groups: Any = None) -> Devices:
        """Return the devices, after checking that the axis is bound here and that each device is in one of the groups.

        Raises:
            ArgumentError: nothing binds the axis, or the groups do not divide its devices into equal parts.
        """
        names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
        size = prod(map(_size, names))
        return cls(names, None if groups is None else _checked(groups, axis_name, size), any(map(_bound_by_vmap, names)))

    @property
    def number(self) -> int:
        """Number of devices that share their statistics."""
        return prod(map(_size, self.names)) if self.groups is None else len(self.groups[0])

    def gathered(self, row: jax.Array) -> jax.Array:
        """Return the rows of all devices, (devices, numbers), in the order of the devices."""
        if self.groups is not None and not self.by_vmap:
            return jax.lax.all_gather(row, self.names, axis_index_groups=self.groups)
        rows = self._all(row)
        return rows if self.groups is None else rows[jnp.asarray(self.groups)[self._own_group()]]

    def total(self, row: jax.Array) -> jax.Array:
        """Return the sum of the rows of all devices."""
        if self.groups is None:
            return jax.lax.psum(row, self.names)
        if not self.by_vmap and not varying_axes(row):
            return jax.lax.psum(row, self.names, axis_index_groups=self.groups)
        # JAX does not sum groups either where shard_map checks which devices hold the same: then each group has its own row.
        own = self._own_group()
        rows = jnp.where(jnp.arange(len(self.groups))[:, None] == own, jnp.ravel(row), 0)
        return jnp.reshape(jax.lax.psum(rows, self.names)[own], jnp.shape(row))

    def alike(self, found: Any) -> Any:
        """Return arrays of a single device as arrays that all devices hold, where types or vmap say so: one program for any
        number of devices."""
        if self.groups is not None:
            return found
        names = frozenset(self.names)
        return jax.tree.map(lambda a: jax.lax.psum(a, self.names) if self.by_vmap or names & varying_axes(a) else a, found)

    def _all(self, row: jax.Array) -> jax.Array:
        if self.by_vmap:
            for name in reversed(self.names):
                row = jax.lax.all_gather(row, name)
            return jnp.reshape(row, (-1, row.shape[-1]))
        if set(self.names) <= varying_axes(row) and "to" in signature(jax.lax.all_gather).parameters:
            return jax.lax.all_gather(row, self.names, to="invarying")  # which the types say then
        return jax.lax.all_gather(row, self.names)

    def _own_group(self) -> Any:
        assert self.groups is not None
        group_of = {device: i for i, group in enumerate(self.groups) for device in group}
        return jnp.asarray([group_of[device] for device in range(len(group_of))])[jax.lax.axis_index(self.names)]


def _size(name: Hashable) -> int:
    try:
        return int(jax.lax.axis_size(name))
    except (NameError, KeyError, TypeError):
        raise ArgumentError(
            f"axis_name names an axis that pmap, shard_map or vmap binds around the call; {name!r} is not bound here; "
            "arrays that jit spreads over a mesh are normalized as one batch without axis_name"
        ) from None


def _bound_by_vmap(name: Hashable) -> bool:
    return type(jax.lax.axis_index(name)).__name__ == "BatchTracer"  # a private class of JAX


def _checked(groups: Any, axis_name: AxisName, size: int) -> tuple[tuple[int, ...], ...]:
    try:
        found = tuple(tuple(map(index, group)) for group in groups)
    except TypeError:
        found = ()
    if sorted(device for group in found for device in group) != list(range(size)) or len(set(map(len, found))) != 1:
        raise ArgumentError(
            f"axis_index_groups divides the {size} devices of axis {axis_name!r}, each in one, into groups of one size; "
            f"received {groups!r}; name the devices 0 to {size - 1} once each"
        )
    return found
