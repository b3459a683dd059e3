"""The reference kernel as functions of named JAX arrays: batch normalization, its tangents and its gradients.

What every lowering computes, and what second derivatives are taken of. Arrays are views (..., groups, outer, channel,
inner) with any number of axes in front, along which all are independent, parameters and statistics included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evennorm.core.moments import Moments, count_of, moments
from evennorm.core.normalize import acting, activate, normalize
from evennorm.core.tangents import tangents
from evennorm.jax.namespace import xp
from evennorm.kernels import reference

Arrays = dict[str, jax.Array]
Names = tuple[str, ...]


class Options(NamedTuple):
    """What is known when a program is traced."""

    epsilon: float
    negative_slope: float
    kernel: str
    """As `kernels.choose` has it."""


def forward(given: Arrays, _: Arrays, options: Options, wanted: Names) -> Arrays:
    """y and the statistics of x; signs, where wanted: which elements of y the activation let through, a bit each."""
    x, gamma, beta, residual, mask = given["x"], *map(given.get, ("gamma", "beta", "residual", "mask"))
    if "signs" not in wanted:
        y, statistics = reference.forward(xp, options, x, gamma, beta, residual, mask)
        return {"y": y, **_named(statistics)}
    wide = reference.wide(xp, x)
    statistics = moments(xp, wide, mask)
    z = normalize(xp, wide, statistics, gamma, beta, options.epsilon, residual=reference.wide(xp, residual))
    y = xp.astype(activate(xp, z, options.negative_slope), xp.dtype(x))
    return {"y": y, **_named(statistics), "signs": _packed(~(z <= 0))}


def tangent(saved: Arrays, moving: Arrays, options: Options, wanted: Names) -> Arrays:
    """How y, mean_low and variance move with `moving`: tangents of some of x, gamma, beta and residual."""
    x, gamma = reference.wide(xp, saved["x"]), saved.get("gamma")
    wide = {name: reference.wide(xp, t) for name, t in moving.items()}
    statistics, mask = _statistics(saved), saved.get("mask")
    t = tangents(xp, x, statistics, gamma, options.epsilon, wide.get("x"), wide.get("gamma"), wide.get("beta"), mask)
    z = t.z if "residual" not in wide else wide["residual"] if t.z is None else t.z + wide["residual"]
    z = xp.broadcast_to(z, xp.shape(x))
    found = {"y": xp.astype(_gated(z, saved, options), xp.dtype(saved["x"])), "mean_low": t.mean, "variance": t.variance}
    return {name: found[name] for name in wanted}


def backward(saved: Arrays, cotangents: Arrays, options: Options, wanted: Names) -> Arrays:
    """The transpose of `tangent`: from derivatives of some of y, mean_low and variance to those of the inputs."""
    dy = cotangents.get("y")
    dy = reference.wide(xp, jnp.zeros_like(saved["x"]) if dy is None else dy)
    if "mask" in saved:
        dy = jnp.where(acting(xp, saved["mask"], reference.wide(xp, saved["x"]), dy), dy, 0.0)
    dz = _gated(dy, saved, options)
    gamma, beta = saved.get("gamma"), saved.get("beta")
    d_mean, d_variance = cotangents.get("mean_low"), cotangents.get("variance")
    statistics, mask = _statistics(saved), saved.get("mask")
    linear = options._replace(negative_slope=1.0)  # dz is behind the activation already
    g = reference.backward(xp, linear, dz, saved["x"], statistics, gamma, beta, None, mask, d_mean, d_variance)
    found = g._replace(residual=xp.astype(dz, xp.dtype(saved["x"])))._asdict()
    return {name: found[name] for name in wanted}


def over_views(function: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """The same function for views with axes in front."""

    def run(given: Arrays, linear: Arrays, options: Options, wanted: Names) -> Arrays:
        one = partial(function, options=options, wanted=wanted)
        for _ in range(given["x"].ndim - 4):
            one = jax.vmap(one)
        return one(given, linear)

    return run


def _named(statistics: Moments) -> Arrays:
    return {"mean": statistics.mean, "mean_low": statistics.mean_low, "variance": statistics.variance}


def _statistics(saved: Arrays) -> Moments:
    count = count_of(xp, reference.wide(xp, saved["x"]), saved.get("mask"))
    return Moments(count, saved["mean"], saved["mean_low"], saved["variance"])


def _gated(z: jax.Array, saved: Arrays, options: Options) -> jax.Array:
    """`z` times the activation's derivative: by the signs that were kept, else by those of the normalized x."""
    if options.negative_slope == 1:
        return z
    if "signs" in saved:
        closed = ~_unpacked(saved["signs"], z.shape)
    else:
        x, gamma, beta = reference.wide(xp, saved["x"]), saved.get("gamma"), saved.get("beta")
        closed = normalize(xp, x, _statistics(saved), gamma, beta, options.epsilon) <= 0
    return jnp.where(closed, 0.0 if options.negative_slope == 0 else options.negative_slope * z, z)


def _packed(view: jax.Array) -> jax.Array:
    """Booleans as bits, in the compiled kernels' order; as they are where there are none, or their number is a symbol."""
    if not _has_bits(view.shape):
        return view
    return jnp.packbits(view.reshape(_runs(view.shape)), axis=-1, bitorder="little")


def _unpacked(signs: jax.Array, shape: tuple[Any, ...]) -> jax.Array:
    if not _has_bits(shape):
        return signs
    bits = jnp.unpackbits(signs, axis=-1, count=_runs(shape)[-1], bitorder="little")
    return bits.reshape(shape).astype(bool)


def _has_bits(shape: tuple[Any, ...]) -> bool:
    return all(isinstance(size, int) and size > 0 for size in shape)


def _runs(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The runs of contiguous elements that the compiled kernels keep signs by; each begins a byte."""
    groups, outer, channel, inner = shape
    if channel == 1:
        return groups, outer * inner
    return (groups, outer, channel) if inner == 1 else shape
