"""Express the reference kernel as functions of named JAX arrays: batch normalization, its tangents and its gradients.

Every lowering computes these functions, and second derivatives are taken of them. Arrays are views (..., groups, outer,
channel, inner) with any number of leading axes, along which all are independent, parameters and statistics included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evennorm.core.activation import LINEAR, Activation, activate, gated_by, is_closed
from evennorm.core.moments import Moments, count_of, moments, per_channel
from evennorm.core.normalize import (
    acting,
    fixed_stats_gradients,
    gradient_sums,
    moments_gradient,
    normalize,
    without,
)
from evennorm.core.tangents import tangents
from evennorm.jax.namespace import xp
from evennorm.kernels import reference, xla

Arrays = dict[str, jax.Array]
Names = tuple[str, ...]


class Options(NamedTuple):
    """The settings that are known when a program is traced."""

    epsilon: float
    activation: Activation
    kernel: str
    """The name of the kernel, as `kernels.choose` returns it."""
    exchanged: bool = False
    """Whether devices exchange their moments, so that those by which x is normalized do not come from this x alone.

    Then y moves with x, `mean_low` and `variance` as with three inputs, and the moments with x for themselves. Derivatives
    by x are as wide as those by the statistics, since they are added up before they are rounded.
    """


def forward(given: Arrays, _: Arrays, options: Options, wanted: Names) -> Arrays:
    """Compute y and the statistics of x; and relu_mask, if wanted: one bit per element, set where the activation let it
    through."""
    statistics = moments(xp, reference.wide(xp, given["x"]), given.get("mask"))
    return {**_named(statistics), **by_fixed_stats(given, statistics, options, wanted)}


def by_fixed_stats(given: Arrays, statistics: Moments, options: Options, wanted: Names) -> Arrays:
    """Compute y by statistics from elsewhere; and relu_mask, if wanted."""
    x, gamma, beta, residual = given["x"], *map(given.get, ("gamma", "beta", "residual"))
    if "relu_mask" not in wanted:
        return {"y": reference.infer(xp, options, x, statistics, gamma, beta, residual)}
    wide = reference.wide(xp, residual)
    z = normalize(xp, reference.wide(xp, x), statistics, gamma, beta, options.epsilon, residual=wide)
    return {
        "y": xp.astype(activate(xp, z, options.activation), xp.dtype(x)),
        "relu_mask": _packed(~is_closed(z, options.activation)),
    }


def tangent(saved: Arrays, moving: Arrays, options: Options, wanted: Names) -> Arrays:
    """Compute how y, mean_low and variance move with `moving`: tangents of some of x, gamma, beta and residual."""
    x, gamma = reference.wide(xp, saved["x"]), saved.get("gamma")
    wide = {name: reference.wide(xp, t) for name, t in moving.items()}
    statistics, mask = _statistics(saved), saved.get("mask")
    by_statistics = (wide.get("mean_low"), wide.get("variance")) if options.exchanged and "y" in wanted else None
    moved = wide.get("x"), wide.get("gamma"), wide.get("beta")
    t = tangents(xp, x, statistics, gamma, options.epsilon, *moved, mask, by_statistics)
    if "alone" in saved:
        rest = tangents(xp, x, statistics, gamma, options.epsilon, None, *moved[1:], mask, (None, wide.get("variance"))).z
        t = t._replace(z=jnp.where(saved["alone"], 0.0 if rest is None else rest, 0.0 if t.z is None else t.z))
    z = t.z if "residual" not in wide else wide["residual"] if t.z is None else t.z + wide["residual"]
    z = xp.broadcast_to(z, xp.shape(x))
    found = {"y": xp.astype(gated(z, saved, options), xp.dtype(saved["x"])), "mean_low": t.mean, "variance": t.variance}
    return {name: found[name] for name in wanted}


def backward(saved: Arrays, cotangents: Arrays, options: Options, wanted: Names) -> Arrays:
    """Compute the transpose of `tangent`: from derivatives by some of y, mean_low and variance to those by the inputs."""
    statistics, mask = _statistics(saved), saved.get("mask")
    d_mean, d_variance = cotangents.get("mean_low"), cotangents.get("variance")
    if "y" not in cotangents:
        dx = moments_gradient(xp, reference.wide(xp, saved["x"]), statistics, mask, d_mean, d_variance)
        of_others = {name: jnp.zeros_like(saved[name]) for name in wanted if name != "x"}
        return of_others | ({"x": _narrowed(dx, saved, options)} if "x" in wanted else {})
    dy = reference.wide(xp, cotangents["y"])
    if mask is not None:
        dy = jnp.where(acting(xp, mask, reference.wide(xp, saved["x"]), dy), dy, 0.0)
    dz = gated(dy, saved, options)
    if options.exchanged:
        return _backward_by_fixed_stats(saved, dz, cotangents, options, wanted)
    gamma, beta = saved.get("gamma"), saved.get("beta")
    linear = options._replace(activation=LINEAR)  # dz has the activation's derivative already
    g = reference.backward(xp, linear, dz, saved["x"], statistics, gamma, beta, None, mask, d_mean, d_variance)
    found = g._replace(residual=xp.astype(dz, xp.dtype(saved["x"])))._asdict()
    return {name: found[name] for name in wanted}


def _backward_by_fixed_stats(saved: Arrays, dz: jax.Array, sums: Arrays, options: Options, wanted: Names) -> Arrays:
    """Compute the same where the statistics are inputs: only the sums over dz need x, and a kernel may have taken them.

    A value that is `alone` in its channel on all devices is its own mean, and its dz acts on neither: exactly, as elsewhere.
    """
    x, statistics = reference.wide(xp, saved["x"]), _statistics(saved)
    if "mask" in saved:
        x = without(xp, x, saved["mask"] | xp.isfinite(x), statistics)
    if "sum_dz" in sums:
        sum_dz, sum_dz_xhat = sums["sum_dz"], sums["sum_dz_xhat"]
    else:
        sum_dz, sum_dz_centred = gradient_sums(xp, dz, x, statistics)
        sum_dz_xhat = sum_dz_centred / jnp.sqrt(statistics.variance + options.epsilon)
    moving, sum_moving = dz, sum_dz
    if "alone" in saved:
        moving = jnp.where(saved["alone"], 0.0, dz)
        sum_moving, _ = gradient_sums(xp, moving, x, statistics)
    by_gamma = saved.get("gamma"), options.epsilon
    scale, d_mean, d_variance = fixed_stats_gradients(xp, statistics, *by_gamma, sum_moving, sum_dz_xhat)
    found = {
        "x": moving * per_channel(xp, scale),
        "gamma": jnp.sum(sum_dz_xhat, 0),
        "beta": jnp.sum(sum_dz, 0),
        "residual": xp.astype(dz, xp.dtype(saved["x"])),
        "mean_low": d_mean,
        "variance": d_variance,
    }
    return {name: found[name] for name in wanted}


def _narrowed(dx: jax.Array, saved: Arrays, options: Options) -> jax.Array:
    return dx if options.exchanged else xp.astype(dx, xp.dtype(saved["x"]))


def over_views(function: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """Return the same function for views with leading axes."""

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


def gated(z: jax.Array, saved: Arrays, options: Options) -> jax.Array:
    """Multiply `z` by the activation's derivative: by the mask that was kept, else by the normalized x."""
    if options.activation == LINEAR:
        return z
    if "relu_mask" in saved:
        closed = ~_unpacked(saved["relu_mask"], z.shape)
    else:
        x, gamma, beta = reference.wide(xp, saved["x"]), saved.get("gamma"), saved.get("beta")
        closed = is_closed(normalize(xp, x, _statistics(saved), gamma, beta, options.epsilon), options.activation)
    return gated_by(xp, z, closed, options.activation)


def _packed(view: jax.Array) -> jax.Array:
    """Pack booleans into bits, in the compiled kernels' order; leave them where there are none, or their number is a
    symbol."""
    if not _has_bits(view.shape):
        return view
    return jnp.packbits(view.reshape(_runs(view.shape)), axis=-1, bitorder="little")


def _unpacked(relu_mask: jax.Array, shape: tuple[Any, ...]) -> jax.Array:
    if not _has_bits(shape):
        return relu_mask
    bits = jnp.unpackbits(relu_mask, axis=-1, count=_runs(shape)[-1], bitorder="little")
    return bits.reshape(shape).astype(bool)


def _has_bits(shape: tuple[Any, ...]) -> bool:
    return all(isinstance(size, int) and size > 0 for size in shape)


def _runs(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the runs of contiguous elements by which the compiled kernels keep the mask; each begins a byte.

    A run is a plane, or all short planes of a sample.
    """
    groups, outer, channel, inner = shape
    if channel == 1:
        return groups, outer * inner
    return (groups, outer, channel * inner) if inner <= max(1, xla.BUNDLED_PLANE) else shape
