"""Tell whether a program sees one device's part of an array, and not the array."""

from __future__ import annotations

import jax


def axes() -> tuple[str, ...]:
    """Return the names of the axes over which devices run programs of their own, as under shard_map and pmap.

    Example:
        >>> axes()
        ()
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh.manual_axes if mesh.shape[axis] > 1)
