"""Exchange rows of numbers between the devices of a named axis."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from inspect import signature
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evennorm.errors import ArgumentError
from evennorm.jax.varying import varying_axes

AxisName = Hashable | tuple[Hashable, ...]


class Devices(NamedTuple):
    """The devices that share their statistics: those along an axis, or within a group of them."""

    axis_name: AxisName
    groups: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def named(cls, axis_name: AxisName, groups: Iterable[Iterable[int]] | None = None) -> Devices:
        """Check that the axis is bound where this is called, and that each of its devices is in one of the groups.

        Raises:
            ArgumentError: nothing binds the axis, or the groups do not divide its devices into equal parts.
        """
        names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
        size = prod(_size(name) for name in names)
        bound = names[0] if len(names) == 1 else names
        return cls(bound, None if groups is None else _checked(groups, bound, size))

    @property
    def number(self) -> int:
        """How many devices share their statistics."""
        if self.groups is not None:
            return len(self.groups[0])
        return prod(_size(name) for name in (self.axis_name if isinstance(self.axis_name, tuple) else (self.axis_name,)))

    def gathered(self, row: jax.Array) -> jax.Array:
        """The rows of all devices, (devices, numbers), in the order of the devices."""
        if self.groups is None:
            return _gathered(row, self.axis_name)
        try:
            return jax.lax.all_gather(row, self.axis_name, axis_index_groups=self.groups)
        except NotImplementedError:  # under vmap
            return _gathered(row, self.axis_name)[jnp.asarray(self.groups)[self._own_group()]]

    def total(self, row: jax.Array) -> jax.Array:
        """The sum of the rows of all devices."""
        if self.groups is None:
            return jax.lax.psum(row, self.axis_name)
        try:
            return jax.lax.psum(row, self.axis_name, axis_index_groups=self.groups)
        except NotImplementedError:  # under vmap, and where shard_map checks which devices hold the same
            own = self._own_group()
            rows = jnp.where(jnp.arange(len(self.groups))[:, None] == own, row, 0)
            return jax.lax.psum(rows, self.axis_name)[own]

    def _own_group(self) -> Any:
        assert self.groups is not None
        group_of = {device: i for i, group in enumerate(self.groups) for device in group}
        return jnp.asarray([group_of[device] for device in range(len(group_of))])[jax.lax.axis_index(self.axis_name)]


def _gathered(row: jax.Array, axis_name: AxisName) -> jax.Array:
    """Known to be the same on all devices, where JAX keeps that in types and can say it of this operation."""
    names = set(axis_name) if isinstance(axis_name, tuple) else {axis_name}
    if names <= varying_axes(row) and "to" in signature(jax.lax.all_gather).parameters:
        return jax.lax.all_gather(row, axis_name, to="invarying")
    return jax.lax.all_gather(row, axis_name)


def _size(name: Hashable) -> int:
    try:
        return int(jax.lax.axis_size(name))
    except (NameError, KeyError):
        raise ArgumentError(
            f"axis_name names an axis that pmap, shard_map or vmap binds around the call; {name!r} is not bound here; "
            "arrays that jit spreads over a mesh are normalized as one batch without axis_name"
        ) from None


def _checked(groups: Iterable[Iterable[int]], axis_name: AxisName, size: int) -> tuple[tuple[int, ...], ...]:
    found = tuple(tuple(int(device) for device in group) for group in groups)
    if sorted(device for group in found for device in group) != list(range(size)) or len(set(map(len, found))) != 1:
        raise ArgumentError(
            f"axis_index_groups divides the {size} devices of axis {axis_name!r}, each in one, into groups of one size; "
            f"received {list(map(list, found))}; name the devices 0 to {size - 1} once each"
        )
    return found
