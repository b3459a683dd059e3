"""The compiled CPU kernels by halves: moments of x alone; what `forward` saved, from given moments; where y fits."""

from __future__ import annotations

from evennorm.core.geometry import Geometry
from evennorm.core.namespace import Array
from evennorm.kernels.cpu import _MOMENTS, _NORMALIZE, _NOWHERE, Memory, Saved, _cpu, _fresh_like, _placed, _view

Statistics = tuple[Array, Array, Array]


def moments(memory: Memory, geometry: Geometry, x: Array) -> Statistics:
    """mean, mean_low and variance of `x`, each (1, channel)."""
    found = _view(geometry, memory.sizes(x), (memory.strides(x),), None)
    if found is None:
        x = memory.copy_like(x, memory.empty_contiguous(x))
        found = _view(geometry, memory.sizes(x), (memory.strides(x),), None)
    assert found is not None, "contiguous arrays have a view"
    sizes, (strides,) = found
    shape = (1, geometry.channel)
    mean, mean_low, variance = memory.empty(shape, x), memory.empty(shape, x), memory.empty(shape, x)
    address = memory.address
    _cpu.forward(
        _MOMENTS,
        memory.dtype(x),
        sizes,
        address(x),
        strides,
        0,
        _NOWHERE,
        0,
        _NOWHERE,
        0,
        0,
        address(mean),
        address(mean_low),
        address(variance),
        0,
        0.0,
        1.0,
    )
    return mean, mean_low, variance


def recalled(
    memory: Memory,
    geometry: Geometry,
    x: Array,
    statistics: Statistics,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    epsilon: float,
    negative_slope: float,
    group_size: int | None = None,
) -> Saved:
    """What `forward` saved, from its statistics. Signs behind a residual come with a y that nobody wants."""
    if residual is None or negative_slope == 1:
        return Saved(statistics, None)
    y = _fresh_like(memory, x, geometry)
    sizes, (y_strides, x_strides, residual_strides), x, residual = _placed(
        memory, geometry, group_size, y, x, residual, with_signs=True
    )
    mean, mean_low, variance = statistics
    signs = memory.empty_bytes(_cpu.sign_bytes(sizes, y_strides))
    address = memory.address
    _cpu.forward(
        _NORMALIZE,
        memory.dtype(x),
        sizes,
        address(x),
        x_strides,
        address(residual),
        residual_strides,
        address(y),
        y_strides,
        0 if gamma is None else address(gamma),
        0 if beta is None else address(beta),
        address(mean),
        address(mean_low),
        address(variance),
        address(signs),
        epsilon,
        negative_slope,
    )
    return Saved(statistics, signs)


def writable(memory: Memory, geometry: Geometry, out: Array, group_size: int | None = None) -> bool:
    """Whether kernels can write to an array as it lies: one view describes it, with contiguous channels or positions."""
    found = _view(geometry, memory.sizes(out), (memory.strides(out),), group_size)
    if found is None:
        return False
    (_, outer, channel, inner), ((_, by_outer, by_channel, by_inner),) = found
    if channel > 1 and by_channel == 1:
        return True
    positions = [stride for size, stride in ((outer, by_outer), (inner, by_inner)) if size > 1]
    return not positions or 1 in positions
