"""Normalize by the statistics of all devices: local moments, one exchange, then y by the moments of the whole batch.

Its derivative exchanges once more: the sum over devices of what each one's tangents add to those of the whole, 2 numbers per
channel. JAX transposes that sum to itself, so that reverse mode exchanges as little, and derivatives of any order are right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from evennorm.core.activation import LINEAR
from evennorm.core.exchange import local_tangents, merged, packed
from evennorm.core.moments import Moments, count_of
from evennorm.jax import composed
from evennorm.jax.composed import Names, Options
from evennorm.jax.devices import Devices
from evennorm.jax.namespace import xp
from evennorm.jax.primitives import STATISTICS, forward_p, moves, tangent_p
from evennorm.jax.varying import varying_like
from evennorm.kernels import reference

MOVING = ("mean_low", "variance")
"""The statistics that carry derivatives."""

LOCAL = tuple(f"local_{name}" for name in STATISTICS)


def train(devices: Devices, options: Options, arrays: dict[str, jax.Array]) -> tuple[jax.Array, Moments]:
    """Compute y of this device, and the moments of all devices."""
    found = _together(devices, options._replace(exchanged=True), tuple(arrays))(*arrays.values())
    count = _count(arrays)
    whole = found["count"] if "mask" in arrays else devices.number * count
    return found["y"], Moments(whole, *(found[name] for name in STATISTICS))


@lru_cache(maxsize=4096)
def _together(devices: Devices, options: Options, names: Names) -> Callable[..., dict[str, jax.Array]]:
    """Return a function of the arrays with these names, which JAX differentiates by `moved`."""

    @jax.custom_jvp
    def run(*arrays: jax.Array) -> dict[str, jax.Array]:
        given = dict(zip(names, arrays, strict=True))
        local = _local_moments(given, options)
        whole = merged(xp, devices.gathered(packed(xp, local)), *local.mean.shape)
        mask_name = ("relu_mask",) if "residual" in given and options.activation != LINEAR else ()
        found = composed.by_fixed_stats(given, whole, options, ("y", *mask_name))
        return found | dict(zip(("count", *STATISTICS), whole, strict=True)) | dict(zip(LOCAL, local[1:], strict=True))

    def moved(primals: Any, tangents: Any) -> Any:
        given = dict(zip(names, primals, strict=True))
        moving = {name: t for name, t in zip(names, tangents, strict=True) if moves(t)}
        found = run(*primals)
        tangent = {name: _no_tangent(a) for name, a in found.items()}
        if "x" in moving:
            moving["x"] = reference.wide(xp, moving["x"])
            of_local, of_whole = _moved_moments(devices, options, given, found, moving["x"])
            own = varying_like(of_whole, given["x"])  # in one piece, since its transpose is a sum over devices
            moving |= zip(MOVING, jnp.split(own, 2, axis=1), strict=True)
            tangent |= {f"local_{name}": t for name, t in zip(MOVING, of_local, strict=True)}
            of_whole = varying_like(of_whole, found["mean_low"])
            tangent |= zip(MOVING, jnp.split(of_whole, 2, axis=1), strict=True)
        if moving:
            tangent["y"] = _moved_y(options, given, found, moving)
        return found, tangent

    run.defjvp(moved, symbolic_zeros=True)
    return run


def _local_moments(given: dict[str, jax.Array], options: Options) -> Moments:
    """Compute the moments of this device, reading x once and writing nothing."""
    arrays = {name: given[name] for name in ("x", "mask") if name in given}
    plain = options._replace(activation=LINEAR, exchanged=False)
    names = {"given": tuple(arrays), "linear": (), "options": plain, "wanted": STATISTICS}
    statistics = forward_p.bind(*arrays.values(), **names)
    return Moments(_count(given), *statistics)


def _moved_moments(
    devices: Devices, options: Options, given: dict[str, jax.Array], found: dict[str, jax.Array], tx: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Compute how mean and variance of this device move with its x, and, in one row, how those of all devices move."""
    saved = {"x": given["x"], **dict(zip(STATISTICS, (found[name] for name in LOCAL), strict=True))}
    if "mask" in given:
        saved["mask"] = given["mask"]
    names = {"given": tuple(saved), "linear": ("x",), "options": options, "wanted": MOVING}
    of_local = tangent_p.bind(*saved.values(), tx, **names)
    local = Moments(_count(given), *(found[name] for name in LOCAL))
    whole = Moments(found["count"], *(found[name] for name in STATISTICS))
    return of_local, devices.total(jnp.concatenate(local_tangents(xp, local, whole, *of_local), axis=1))


def _moved_y(
    options: Options, given: dict[str, jax.Array], found: dict[str, jax.Array], moving: dict[str, jax.Array]
) -> jax.Array:
    saved = {name: a for name, a in given.items() if name != "residual"}
    saved |= {name: varying_like(found[name], given["x"]) for name in STATISTICS}
    if "mask" in given:
        saved["alone"] = given["mask"] & (found["count"] <= 1)[:, None, :, None]
    if "relu_mask" in found:
        saved["relu_mask"] = found["relu_mask"]
    beside = moving.pop("residual", None) if options.activation == LINEAR else None
    ty = None
    if moving:
        names = {"given": tuple(saved), "linear": tuple(moving), "options": options, "wanted": ("y",)}
        (ty,) = tangent_p.bind(*saved.values(), *moving.values(), **names)
    return beside if ty is None else ty if beside is None else ty + beside


def _count(given: dict[str, jax.Array]) -> Any:
    return count_of(xp, reference.wide(xp, given["x"]), given.get("mask"))


def _no_tangent(a: jax.Array) -> Any:
    return jax.custom_derivatives.zero_from_primal(a)
