"""Run the compiled kernels on each device's part of an array that XLA spreads over a mesh.

XLA asks how an array is to lie, and what each device does then (`custom_partitioning`). Where the values of a channel lie on
several devices, these exchange their moments forward, and two sums backward; where channels are spread, nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from evennorm.core.exchange import merged, packed
from evennorm.core.moments import Moments
from evennorm.core.normalize import input_gradient
from evennorm.jax import composed
from evennorm.jax.composed import Arrays, Names, Options
from evennorm.jax.namespace import xp
from evennorm.kernels import reference

try:  # a private module of JAX; without it, the composed form computes
    from jax._src.dispatch import prim_requires_devices_during_lowering as _asking
except ImportError:
    _asking = set()

VIEW = ("g", "o", "c", "i")
CHANNELS, STATISTICS = ("c",), ("g", "c")
FACTORS = {"gamma": CHANNELS, "beta": CHANNELS, "mean": STATISTICS, "mean_low": STATISTICS, "variance": STATISTICS}
"""The axes of a view that an array has; an array that is not listed has all."""

Kernel = Callable[[Names, Arrays, Names], Arrays]
"""A call of compiled code: names of its operands, arrays that have them, names of its results."""

Part = Callable[[Arrays, tuple[str, ...]], Arrays]
"""The computation of one device, and the axes of the mesh along which others hold values of its channels."""


def ask_for_devices(*primitives: Any) -> None:
    """Make JAX say, from here on, which devices it lowers these for, if this process may have several CPU devices.

    Without that no part can be cut. A program that holds such primitives has one mesh, and is not lowered for a mesh without
    devices: JAX refuses both. So nothing is asked where no array can be spread.
    """
    several = jax.config.jax_num_cpu_devices > 1 or jax.distributed.is_initialized()
    if several or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        _asking.update(primitives)


def supports(given: Names, linear: Names, wanted: Names, x: Any) -> bool:
    """Return whether kernels can compute parts: not under vmap, nor for ghost batches, nor for packed bits of an
    activation."""
    return "relu_mask" not in (*given, *wanted) and linear in ((), ("y",)) and x.ndim == 4 and x.shape[0] == 1


def forward(kernel: Kernel, options: Options, given: Names, wanted: Names) -> Callable[..., Any]:
    """Return the forward pass as a function of operands that XLA may partition."""

    def of_part(arrays: Arrays, axes: tuple[str, ...]) -> Arrays:
        if not axes:
            return kernel(given, arrays, wanted)
        x = arrays["x"]
        local = kernel(("x",), arrays, ("mean", "mean_low", "variance"))
        row = packed(xp, Moments(x.shape[1] * x.shape[3], **local))
        whole = merged(xp, jax.lax.all_gather(row, axes), *local["mean"].shape)
        found = {name: getattr(whole, name) for name in local}
        return found | (composed.by_fixed_stats(arrays, whole, options, ("y",)) if "y" in wanted else {})

    def of_all(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return _in_order(composed.forward(dict(zip(given, operands, strict=True)), {}, options, wanted), wanted)

    return _cut(of_all, given, wanted, of_part)


def backward(kernel: Kernel, options: Options, given: Names, wanted: Names) -> Callable[..., Any]:
    """Return the backward pass, by dy alone, as such a function."""
    names = (*given, "d_y")

    def of_part(arrays: Arrays, axes: tuple[str, ...]) -> Arrays:
        if not axes:
            return kernel(names, arrays, wanted)
        x, gamma = reference.wide(xp, arrays["x"]), arrays.get("gamma")
        local = kernel(names, arrays, ("gamma", "beta"))
        sum_dz_xhat, sum_dz = jax.lax.psum(jnp.stack([local["gamma"], local["beta"]]), axes)
        count = x.shape[1] * x.shape[3] * jax.lax.axis_size(axes)
        whole = Moments(count, arrays["mean"], arrays["mean_low"], arrays["variance"])
        dz = composed.gated(reference.wide(xp, arrays["d_y"]), arrays, options)
        centred = sum_dz_xhat * jnp.sqrt(whole.variance + options.epsilon)
        dx = input_gradient(xp, dz, x, whole, gamma, options.epsilon, sum_dz[None], centred)
        return {"x": xp.astype(dx, arrays["x"].dtype), "gamma": sum_dz_xhat, "beta": sum_dz}

    def of_all(*operands: jax.Array) -> tuple[jax.Array, ...]:
        saved = dict(zip(given, operands, strict=False))
        return _in_order(composed.backward(saved, {"y": operands[-1]}, options, wanted), wanted)

    return _cut(of_all, names, wanted, of_part)


def _cut(of_all: Callable[..., Any], names: Names, wanted: Names, of_part: Part) -> Callable[..., Any]:
    def shardings(mesh: Any, arrays: Any) -> tuple[dict[str, Any], list[NamedSharding], tuple[NamedSharding, ...]]:
        spread = _spread(mesh, arrays[0])

        def lying(name: str) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(spread[factor] for factor in FACTORS.get(name, VIEW))))

        return spread, [lying(name) for name in names], tuple(lying(name) for name in wanted)

    def partition(mesh: Any, arrays: Any, _: Any) -> Any:
        spread, operands, results = shardings(mesh, arrays)
        axes = (*_axes(spread["o"]), *_axes(spread["i"]))

        def part(*operands: jax.Array) -> tuple[jax.Array, ...]:
            return _in_order(of_part(dict(zip(names, operands, strict=True)), axes), wanted)

        return mesh, part, results, tuple(operands)

    function = custom_partitioning(of_all)
    function.def_partition(
        partition=partition,
        infer_sharding_from_operands=lambda mesh, arrays, _: shardings(mesh, arrays)[2],
        sharding_rule=f"{_rule(names)} -> {_rule(wanted)}",
    )
    return function


def _spread(mesh: Any, x: Any) -> dict[str, Any]:
    """Return the axes of the mesh over which each axis of the view is sharded; those that do not divide it are taken
    together."""
    spec = (*x.sharding.spec, *[None] * 4)[:4]
    sizes = [prod(mesh.shape[name] for name in _axes(names)) for names in spec]
    whole = [names if size % number == 0 else None for names, size, number in zip(spec, x.shape, sizes, strict=True)]
    return dict(zip(VIEW, whole, strict=True))


def _axes(names: Any) -> tuple[str, ...]:
    return () if names is None else names if isinstance(names, tuple) else (names,)


def _rule(names: Names) -> str:
    return ", ".join(" ".join(FACTORS.get(name, VIEW)) for name in names)


def _in_order(found: Arrays, wanted: Names) -> tuple[jax.Array, ...]:
    return tuple(found[name] for name in wanted)
