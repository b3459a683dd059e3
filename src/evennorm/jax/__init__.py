"""JAX arrays in, normalized JAX arrays and their Moments out; works under jit, grad, vmap, jvp and their compositions."""

from __future__ import annotations

from typing import Any

import numpy as np

from evennorm.core.call import Call
from evennorm.core.engine import Engine
from evennorm.core.moments import Moments, count_of
from evennorm.errors import MissingExtra
from evennorm.kernels import choose, reference

try:
    import jax
except ImportError as error:
    raise MissingExtra("evennorm.jax", "jax", error.name) from error

from evennorm.jax import lowering
from evennorm.jax.composed import Options
from evennorm.jax.namespace import xp
from evennorm.jax.primitives import STATISTICS, forward_p

__all__ = ["Moments", "batch_norm", "engine", "normalize"]

lowering.register()


def _train(call: Call, x: Any, gamma: Any, beta: Any, residual: Any, mask: Any) -> tuple[Any, Moments]:
    wide = reference.wide(xp, x)
    gamma, beta = (None if p is None else xp.astype(p, wide.dtype) for p in (gamma, beta))
    residual = None if residual is None else xp.astype(residual, x.dtype)
    given = {"x": x, "gamma": gamma, "beta": beta, "residual": residual, "mask": mask}
    arrays = _all_varying({name: a for name, a in given.items() if a is not None})
    options = Options(call.epsilon, call.negative_slope, choose("jax", x.dtype.name, training=True))
    y, *statistics = forward_p.bind(
        *arrays.values(), given=tuple(arrays), linear=(), options=options, wanted=("y", *STATISTICS)
    )
    return y, Moments(count_of(xp, wide, mask), *statistics)


def _all_varying(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Under shard_map, parameters that the devices share as arrays of each device, whose derivatives JAX then adds up."""
    axes = {name: _varying_axes(a) for name, a in arrays.items()}
    together = frozenset().union(*axes.values())
    return {name: _varying(a, tuple(together - axes[name])) for name, a in arrays.items()}


def _varying_axes(x: jax.Array) -> frozenset[str]:
    kind = jax.typeof(x)  # has it under another name from JAX 0.10 on
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def _varying(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    if not axes:
        return x
    return jax.lax.pcast(x, axes, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, axes)


class _JaxEngine(Engine):
    def at_hand(self, value: jax.Array) -> np.ndarray | None:
        known = not isinstance(value, jax.core.Tracer) and all(device.platform == "cpu" for device in value.devices())
        return np.asarray(value) if known and value.is_fully_addressable else None


engine = _JaxEngine("jax", xp, _train)
batch_norm = engine.batch_norm
normalize = engine.normalize
