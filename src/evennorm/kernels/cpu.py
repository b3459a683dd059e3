"""The compiled CPU kernels: arrays as they lie in memory go in; y, statistics and gradients come out, in new memory.

What `kernels.reference` defines, without masks. Arrays of a library are reached through `Memory`, so that one text serves
NumPy and torch. The activation's signs are kept as bits where a residual would otherwise have to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import inf, prod
from typing import Any, NamedTuple

from evennorm.core.geometry import Geometry, Strides
from evennorm.core.moments import Moments
from evennorm.core.namespace import Array
from evennorm.core.normalize import Gradients

try:
    from evennorm.kernels import _cpu
except ImportError:  # a source tree that was not built: the reference kernel serves
    _cpu = None  # type: ignore[assignment]

AVAILABLE = _cpu is not None
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
HUGE = 4 << 20
"""Bytes from which an array is written to memory that was used before, or failing that in huge pages."""

__all__ = ["AVAILABLE", "DTYPES", "Memory", "Saved", "_cpu", "backward", "follow", "forward", "inference"]

_MOMENTS, _NORMALIZE, _BOTH = range(3)
_NOWHERE: Strides = (0, 0, 0, 0)


class Memory(NamedTuple):
    """How an array library shows and takes memory."""

    address: Callable[[Array], int]
    strides: Callable[[Array], tuple[int, ...]]
    """In elements."""
    sizes: Callable[[Array], tuple[int, ...]]
    empty_like: Callable[[Array], Array]
    """Dense, its axes in the order of the array's memory."""
    empty_contiguous: Callable[[Array], Array]
    from_dlpack: Callable[[Any], Array] | None
    """None where the library's own memory serves as well."""
    empty: Callable[[tuple[int, ...], Array], Array]
    """Of the precision that an array is computed in."""
    empty_bytes: Callable[[int], Array]
    copy_like: Callable[[Array, Array], Array]
    """A dense copy of the first array in the order of the second's memory."""
    dtype: Callable[[Array], int]
    item_bytes: Callable[[Array], int]


class Saved(NamedTuple):
    """What the backward pass needs beside x."""

    statistics: Sequence[Array]
    """mean, mean_low and variance, groups * channel values each."""
    signs: Array | None
    """A bit per element, along the runs of y: those of dx, which lies like it."""


@lru_cache(maxsize=4096)
def _view(
    geometry: Geometry, sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...], group_size: int | None
) -> tuple[Strides, list[Strides]] | None:
    return geometry.in_memory(sizes, strides, group_size)


def forward(
    memory: Memory,
    geometry: Geometry,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    epsilon: float,
    negative_slope: float,
    group_size: int | None = None,
    out: Array | None = None,
    statistic_shape: tuple[int, ...] | None = None,
    given: Sequence[Array] | None = None,
) -> tuple[Array, Saved]:
    """Training: `x` normalized by its own moments. Parameters are dense, in the precision that `x` is computed in.

    Each statistic is (groups, channel), or of another `statistic_shape` with as many values. Mean, mean_low and variance
    that are `given` take the place of the moments.
    """
    y = _fresh_like(memory, x, geometry) if out is None else out
    with_signs = residual is not None and negative_slope != 1
    sizes, (y_strides, x_strides, residual_strides), x, residual = _placed(
        memory, geometry, group_size, y, x, residual, with_signs
    )
    if given is None:
        shape = (sizes[0], sizes[2]) if statistic_shape is None else statistic_shape
        mean, mean_low, variance = memory.empty(shape, x), memory.empty(shape, x), memory.empty(shape, x)
    else:
        mean, mean_low, variance = given
    signs = memory.empty_bytes(_cpu.sign_bytes(sizes, y_strides)) if with_signs else None
    address = memory.address
    _cpu.forward(
        _BOTH if given is None else _NORMALIZE,
        memory.dtype(x),
        sizes,
        address(x),
        x_strides,
        0 if residual is None else address(residual),
        residual_strides,
        address(y),
        y_strides,
        0 if gamma is None else address(gamma),
        0 if beta is None else address(beta),
        address(mean),
        address(mean_low),
        address(variance),
        0 if signs is None else address(signs),
        epsilon,
        negative_slope,
    )
    return y, Saved((mean, mean_low, variance), signs)


def inference(
    memory: Memory,
    geometry: Geometry,
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    epsilon: float,
    negative_slope: float,
    out: Array | None = None,
    mean_low: Array | None = None,
) -> Array:
    """`x` normalized by given statistics, dense and in the precision that `x` is computed in."""
    y = _fresh_like(memory, x, geometry) if out is None else out
    sizes, (y_strides, x_strides, residual_strides), x, residual = _placed(memory, geometry, None, y, x, residual)
    address = memory.address
    _cpu.forward(
        _NORMALIZE,
        memory.dtype(x),
        sizes,
        address(x),
        x_strides,
        0 if residual is None else address(residual),
        residual_strides,
        address(y),
        y_strides,
        0 if gamma is None else address(gamma),
        0 if beta is None else address(beta),
        address(mean),
        0 if mean_low is None else address(mean_low),
        address(variance),
        0,
        epsilon,
        negative_slope,
    )
    return y


def backward(
    memory: Memory,
    geometry: Geometry,
    dy: Array,
    x: Array,
    saved: Saved,
    gamma: Array | None,
    beta: Array | None,
    has_residual: bool,
    epsilon: float,
    negative_slope: float,
    group_size: int | None = None,
    d_mean: Array | None = None,
    d_variance: Array | None = None,
    given: bool = False,
) -> Gradients:
    """The derivatives of `forward`; `given` says that the statistics were, so that x has acted on none."""
    dx = _fresh_like(memory, x, geometry)
    d_residual = _fresh_like(memory, x, geometry) if saved.signs is not None else None
    sizes, (dx_strides, x_strides, dy_strides), x, dy = _placed(
        memory, geometry, group_size, dx, x, dy, saved.signs is not None
    )
    _, outer, channel, inner = sizes
    mean, mean_low, variance = saved.statistics
    d_gamma = None if gamma is None else memory.empty((channel,), x)
    d_beta = None if beta is None else memory.empty((channel,), x)
    address = memory.address
    _cpu.backward(
        _BOTH,
        memory.dtype(x),
        sizes,
        address(dy),
        dy_strides,
        address(x),
        x_strides,
        address(dx),
        dx_strides,
        0 if d_residual is None else address(d_residual),
        0 if gamma is None else address(gamma),
        0 if beta is None else address(beta),
        address(mean),
        address(mean_low),
        address(variance),
        0 if saved.signs is None else address(saved.signs),
        0 if d_mean is None else address(d_mean),
        0 if d_variance is None else address(d_variance),
        0,
        0,
        0 if d_gamma is None else address(d_gamma),
        0 if d_beta is None else address(d_beta),
        epsilon,
        negative_slope,
        inf if given else float(outer * inner),  # behind a mean; of infinitely many values none moves it
    )
    return Gradients(
        dx,
        d_gamma,
        d_beta,
        None if not has_residual else dy if d_residual is None else d_residual,
    )


def follow(memory: Memory, running: tuple[Array, Array, Array], moments: Moments, decay: float, unbiased: bool) -> bool:
    """Writes running mean, its low part and running variance after one more batch; False where `core.running` refuses it.

    All arrays are dense and of one precision; the moments are (groups, channel).
    """
    address, dtype = memory.address, memory.dtype(moments.mean)
    groups, channel = memory.sizes(moments.mean)
    count, mean, mean_low, variance = moments
    running_mean, running_mean_low, running_variance = running
    return _cpu.follow(
        dtype,
        groups,
        channel,
        count,
        address(mean),
        address(mean_low),
        address(variance),
        unbiased,
        decay,
        address(running_mean),
        address(running_mean_low),
        address(running_variance),
    )


def _fresh_like(memory: Memory, x: Array, geometry: Geometry) -> Array:
    """An array to write, in the order of x's memory, or contiguous where that order takes the channel axes apart."""
    sizes, strides = memory.sizes(x), memory.strides(x)
    elements, orderly = _order(geometry, sizes, strides)
    size = elements * memory.item_bytes(x)
    if size < HUGE and orderly:
        return memory.empty_like(x)
    if size >= HUGE and orderly and memory.from_dlpack is not None:
        return memory.from_dlpack(_cpu.buffer(memory.dtype(x), sizes, strides))
    fresh = memory.empty_like(x)
    if _view(geometry, sizes, (memory.strides(fresh),), None) is None:
        fresh = memory.empty_contiguous(x)
    if size >= HUGE:
        _cpu.advise(memory.address(fresh), size)
    return fresh


@lru_cache(maxsize=4096)
def _order(geometry: Geometry, sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, bool]:
    """The number of elements, and whether new arrays are written in the same order: dense, its channel axes together."""
    return prod(sizes), _dense(sizes, strides) and _view(geometry, sizes, (strides,), None) is not None


def _dense(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, sizes, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _placed(
    memory: Memory,
    geometry: Geometry,
    group_size: int | None,
    written: Array,
    x: Array,
    other: Array | None,
    with_signs: bool = False,
) -> tuple[Strides, list[Strides], Array, Array | None]:
    """Sizes and strides of the view that serves all three arrays; those that no such view describes are copied first.

    `with_signs` asks for the sizes of the written array alone, whose runs bits are counted along.
    """
    sizes = memory.sizes(x)
    arrays = (written, x) if other is None else (written, x, other)
    found = _view(geometry, sizes, tuple(map(memory.strides, arrays)), group_size)
    if with_signs and found is not None:
        alone = _view(geometry, sizes, (memory.strides(written),), group_size)
        found = found if alone is not None and found[0] == alone[0] else None
    if found is None:
        x = memory.copy_like(x, written)
        other = None if other is None else memory.copy_like(other, written)
        arrays = (written, x) if other is None else (written, x, other)
        found = _view(geometry, sizes, tuple(map(memory.strides, arrays)), group_size)
    assert found is not None, "dense arrays of one order have a view, and others are contiguous"
    four, strides = found
    return four, strides if other is not None else [*strides, _NOWHERE], x, other
