"""Normalize arrays whose types say how they are sharded over a mesh: XLA spreads the work, and y is sharded like x.

Such types allow no view of x that merges an axis which is spread over devices; and none is needed where XLA decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from evennorm.core.call import Call
from evennorm.core.moments import Moments


def explicit_mesh(arrays: Iterable[Any]) -> Any:
    """Return the mesh over which one of the arrays is sharded by its type; None where XLA decides everything."""
    shardings = (jax.typeof(array).sharding for array in arrays if isinstance(array, jax.Array))
    return next((s.mesh for s in shardings if set(_explicit_axes(s.mesh)) & _names(s.spec)), None)


def trained_by_xla(
    run: Callable[..., tuple[Any, Moments]], call: Call, grouped: bool, mesh: Any, arrays: dict[str, Any]
) -> tuple[Any, Moments]:
    """Compute `run` on the arrays. y is sharded like x, and the moments like its channels; no device has the count alone."""
    given = {name: jax.numpy.asarray(a) for name, a in arrays.items() if a is not None}
    spec = tuple(jax.typeof(given["x"]).sharding.spec) or (None,) * given["x"].ndim
    of_channels = [spec[a] for a in call.geometry.axis]
    if grouped:
        of_channels = [None, *of_channels] if len(of_channels) == 1 else []
    elif call.group_size is not None:
        of_channels = [None, *of_channels]
    known: list[int] = []

    def on_arrays(given: dict[str, Any]) -> tuple[Any, ...]:
        y, moments = run(**{**dict.fromkeys(arrays), **given})
        if isinstance(moments.count, int):
            known.append(moments.count)
            return y, *moments[1:]
        return y, *moments[1:], moments.count

    counts = [] if "mask" not in given else [PartitionSpec()]
    specs = (PartitionSpec(*spec), *[PartitionSpec(*of_channels)] * 3, *counts)
    lying = tuple(NamedSharding(mesh, s) for s in specs)
    spread = jax.sharding.auto_axes(on_arrays, axes=_explicit_axes(mesh), out_sharding=lying)
    if not any(isinstance(a, jax.core.Tracer) for a in given.values()):
        spread = jax.jit(spread)  # one program, since a constant computed outside it would not be on the mesh
    y, *moments = spread(given)
    return y, Moments(known[0] if known else moments.pop(), *moments)


def _explicit_axes(mesh: Any) -> tuple[str, ...]:
    return tuple(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)


def _names(spec: PartitionSpec) -> set[str]:
    return {name for part in spec for name in (part if isinstance(part, tuple) else (part,)) if isinstance(name, str)}
