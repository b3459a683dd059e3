"""Dense tensors on a GPU go in; y, statistics and gradients come out, by as few launches as their size allows.

One launch where a program keeps all values of its channels on the chip; else two, of which the second begins with merging
the sums of the first. Nothing waits for the device. What `kernels.reference` defines, without masks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from struct import pack, unpack
from typing import Any, NamedTuple

from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.core.namespace import Array
from evennorm.core.normalize import Gradients
from evennorm.kernels.triton import backward as gradient_kernels
from evennorm.kernels.triton import forward as kernels
from evennorm.kernels.triton.choices import SETTINGS, Stream, Timing, size_class
from evennorm.kernels.triton.following import follow as follow_kernel
from evennorm.kernels.triton.layout import DEPTH, Cut, cut, dense_view, power_of_two


class Memory(NamedTuple):
    """How an array library shows and takes memory on a GPU."""

    sizes: Callable[[Array], tuple[int, ...]]
    strides: Callable[[Array], tuple[int, ...]]
    """In elements."""
    item_bytes: Callable[[Array], int]
    dtype: Callable[[Array], Hashable]
    device: Callable[[Array], Hashable]
    processors: Callable[[Array], int]
    """Multiprocessors of the array's device."""
    timing: Callable[[Array], Timing]
    empty_like: Callable[[Array], Array]
    """Of the strides of a dense array."""
    empty: Callable[[tuple[int, ...], Array], Array]
    """Of the precision that the array is computed in."""
    empty_bytes: Callable[[int, Array], Array]
    empty_doubles: Callable[[int, Array], Array]
    cleared: Callable[[Array], Array]
    """The array itself, filled with 0."""
    copy_like: Callable[[Array, Array], Array]
    """A copy of the first array with the strides and the dtype of the second."""


class Saved(NamedTuple):
    """What the backward pass needs beside x."""

    statistics: Sequence[Array | None]
    """mean, mean_low and variance, groups * channel values each; given ones have no mean_low."""
    signs: Array | None
    """A bit per element, where an activation follows a residual: `layout` says in which order."""


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
    statistic_shape: tuple[int, ...] | None = None,
    given: tuple[Array, Array | None, Array] | None = None,
) -> tuple[Array, Saved]:
    """Training: `x` normalized by its own moments. Parameters are contiguous, of any float dtype.

    Each statistic is (groups, channel), or of another `statistic_shape` with as many values. Statistics that are `given`
    take the place of the moments.
    """
    how = cut_of(memory, geometry, x, group_size)
    residual = None if residual is None else _lying_like(memory, residual, x)
    shape = (how.view.groups, how.view.channel) if statistic_shape is None else statistic_shape
    y, statistics = memory.empty_like(x), given or tuple(memory.empty(shape, x) for _ in range(3))
    signs = memory.empty_bytes(how.sign_bytes, x) if residual is not None and negative_slope != 1 else None
    if how.view.elements == 0:
        return y, Saved(given or [memory.cleared(statistic) for statistic in statistics], signs)
    numbers, parameters = (epsilon, negative_slope), (gamma, beta)
    if given is not None:
        _normalize(memory, _stream(memory, how, x), x, residual, y, signs, parameters, None, given, 1, numbers)
        return y, Saved(given, signs)
    if how.slots:
        kernels.forward_on_chip[_programs(how)](
            *(x, residual, y, signs, gamma, beta, *statistics),
            *_sizes(how),
            *_halves(*numbers),
            **_on_chip(how),
            ACTIVATION=activation_of(negative_slope),
        )
        return y, Saved(statistics, signs)
    stream = _stream(memory, how, x)
    partials = _room(memory, stream, x)
    splits = stream.launch(
        kernels.moment_sums, memory.dtype(x), (x, partials, *_sizes(how), size_class(how)), _streamed(how)
    )
    _normalize(memory, stream, x, residual, y, signs, parameters, partials, statistics, splits, numbers)
    return y, Saved(statistics, signs)


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
) -> Array:
    """`x` normalized by given statistics, contiguous and of any float dtype."""
    how = cut_of(memory, geometry, x, None)
    residual = None if residual is None else _lying_like(memory, residual, x)
    y = memory.empty_like(x)
    if how.view.elements:
        stream, statistics = _stream(memory, how, x), (mean, None, variance)
        parameters, numbers = (gamma, beta), (epsilon, negative_slope)
        _normalize(memory, stream, x, residual, y, None, parameters, None, statistics, 1, numbers)
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
    frozen: bool = False,
) -> Gradients:
    """The derivatives of `forward`; `d_mean` and `d_variance` are those that reach the moments on another way.

    `frozen` says that the statistics were given, so that x has acted on none.
    """
    how = cut_of(memory, geometry, x, group_size, with_dy=True)
    dy = _lying_like(memory, dy, x)
    dx, d_gamma, d_beta = memory.empty_like(x), *(None if p is None else memory.empty_like(p) for p in (gamma, beta))
    d_residual = memory.empty_like(x) if saved.signs is not None else None
    gradients = Gradients(dx, d_gamma, d_beta, None if not has_residual else dy if d_residual is None else d_residual)
    if how.view.elements == 0:
        for d_parameter in (d_gamma, d_beta):
            if d_parameter is not None:
                memory.cleared(d_parameter)
        return gradients
    given = dy, x, saved.signs, gamma, beta, *saved.statistics
    to = dx, d_residual, d_gamma, d_beta, d_mean, d_variance
    numbers, activation = _halves(epsilon, negative_slope), activation_of(negative_slope)
    if how.slots:
        _backward_on_chip(memory, how, given, to, frozen, numbers, activation)
        return gradients
    stream, constants = _stream(memory, how, x), {**_streamed(how), "ACTIVATION": activation}
    names = memory.dtype(x), saved.signs is not None
    partials = _room(memory, stream, x)
    splits = stream.launch(
        gradient_kernels.gradient_sums, names, (*given, partials, *_sizes(how), *numbers, size_class(how)), constants
    )
    stream.launch(
        gradient_kernels.input_gradient,
        names,
        (*given, *to, partials, how.view.groups, *_sizes(how), splits, int(frozen), *numbers, size_class(how)),
        {**constants, "MERGE": power_of_two(splits)},
    )
    return gradients


def follow(
    memory: Memory,
    running: tuple[Array, Array, Array],
    moments: Moments,
    decay: float,
    unbiased: bool,
    accepted: Array,
) -> None:
    """Writes running mean, its low part and running variance after one more batch, and whether `core.running` accepts it.

    All arrays are dense and of one precision; the moments are (groups, channel) and hold values; `accepted` is one boolean.
    """
    groups, channel = memory.sizes(moments.mean)
    follow_kernel[(1,)](
        *(*moments[1:], *running, accepted),
        *(groups, channel, moments.count, *halves(decay), int(unbiased)),
        LANES=min(1024, power_of_two(channel)),
        **SETTINGS,
    )


def cut_of(memory: Memory, geometry: Geometry, x: Array, group_size: int | None, with_dy: bool = False) -> Cut:
    """How the kernels go through `x`, which is dense."""
    view = dense_view(geometry, memory.sizes(x), memory.strides(x), group_size)
    assert view is not None, "the caller makes arrays dense"
    return cut(view, memory.item_bytes(x), memory.processors(x), with_dy)


def activation_of(negative_slope: float) -> str:
    """
    Example:
        >>> activation_of(1.0), activation_of(0.0), activation_of(0.01)
        ('none', 'relu', 'leaky_relu')
    """
    return {1.0: "none", 0.0: "relu"}.get(negative_slope, "leaky_relu")


@lru_cache(maxsize=256)
def halves(value: float) -> tuple[float, float]:
    """`value` as the sum of two float32, which is what a kernel is given of a float.

    Example:
        >>> high, low = halves(0.1)
        >>> high + low == 0.1, abs(low) < 1e-8
        (True, True)
    """
    (high,) = unpack("f", pack("f", value))
    return high, value - high


def _normalize(
    memory: Memory,
    stream: Stream,
    x: Array,
    residual: Array | None,
    y: Array,
    signs: Array | None,
    parameters: tuple[Array | None, Array | None],
    partials: Array | None,
    statistics: tuple[Array | None, ...],
    splits: int,
    numbers: tuple[float, float],
) -> None:
    names = memory.dtype(x), residual is not None, signs is not None, partials is not None
    constants = {**_streamed(stream.how), "MERGE": power_of_two(splits), "ACTIVATION": activation_of(numbers[1])}
    arrays = x, residual, y, signs, *parameters, partials, *statistics
    sizes = *_sizes(stream.how), splits, *_halves(*numbers), size_class(stream.how)
    stream.launch(kernels.normalize, names, (*arrays, *sizes), constants)


def _backward_on_chip(
    memory: Memory,
    how: Cut,
    given: tuple[Array | None, ...],
    to: tuple[Array | None, ...],
    frozen: bool,
    numbers: tuple[float, ...],
    activation: str,
) -> None:
    _, x, *_, mean_low, variance = given
    _, _, d_gamma, d_beta, _, _ = to
    groups, channels = how.view.groups, how.view.channel
    partials = memory.empty_doubles(groups * 2 * channels, x) if groups > 1 else None
    gradient_kernels.backward_on_chip[_programs(how)](
        *(*given, *to, partials),
        *(groups, *_sizes(how), int(frozen), *numbers),
        **_on_chip(how),
        ACTIVATION=activation,
    )
    if partials is not None and not (d_gamma is None and d_beta is None):
        lanes = min(128, power_of_two(channels))
        gradient_kernels.parameter_gradients_of_groups[(-(-channels // lanes),)](
            d_gamma, d_beta, partials, mean_low, variance, groups, channels, *numbers[:2], LANES=lanes, **SETTINGS
        )


def _stream(memory: Memory, how: Cut, x: Array) -> Stream:
    return Stream(how, memory.item_bytes(x), memory.device(x), memory.processors(x), memory.timing(x))


def _room(memory: Memory, stream: Stream, x: Array) -> Array:
    """For both sums of each channel, in as many parts as the kernel's choice may make."""
    return memory.empty_doubles(stream.how.view.groups * stream.most_splits * 2 * stream.how.view.channel, x)


def _sizes(how: Cut) -> tuple[int, ...]:
    return how.view.outer, how.view.channel, how.view.inner, how.segments, how.lines


def _halves(epsilon: float, negative_slope: float) -> tuple[float, ...]:
    return *halves(epsilon), *halves(negative_slope)


def _programs(how: Cut) -> tuple[int]:
    return (how.blocks(how.lanes) * how.view.groups,)


def _streamed(how: Cut) -> dict[str, Any]:
    length = how.view.inner if how.planes else how.view.channel
    return {**_constants(how), "UNEVEN": length % how.lanes != 0}


def _on_chip(how: Cut) -> dict[str, Any]:
    """With 16 elements for each thread, or 32 where a tile is the largest."""
    warps = min(16, max(1, DEPTH * how.slots * how.lanes // 512))
    return {**_constants(how), "LANES": how.lanes, "SLOTS": how.slots, "num_warps": warps, **SETTINGS}


def _constants(how: Cut) -> dict[str, Any]:
    return {"PLANES": how.planes, "SEGMENTED": how.segments > 1, "UNIT": how.unit, "WIDE": how.wide}


def _lying_like(memory: Memory, array: Array, x: Array) -> Array:
    """`array` with the strides and the dtype of the dense array `x`; itself where it lies so already."""
    same = memory.strides(array) == memory.strides(x) and memory.dtype(array) == memory.dtype(x)
    return array if same else memory.copy_like(array, x)
