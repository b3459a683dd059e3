"""The compiled CPU kernels on NumPy arrays, of any strides and with any channel axes, into new memory or into `out`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.core.normalize import Gradients
from evennorm.kernels import choose, cpu
from evennorm.kernels import cpu_halves as halves
from evennorm.numpy.arrays import copy, count, overlap, wide


class _Lent:
    """Memory of a buffer as NumPy wants it shown: `from_dlpack` makes read-only arrays, and knows no bfloat16."""

    def __init__(self, capsule: Any):
        self._capsule = capsule
        self._array = np.from_dlpack(self)
        self.__array_interface__ = {**self._array.__array_interface__, "data": (self._array.ctypes.data, False)}

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


@lru_cache(maxsize=16)
def serves(dtype: np.dtype) -> bool:
    return choose("numpy", dtype.name) == "cpu"


@lru_cache(maxsize=16)
def _number(dtype: np.dtype) -> int:
    return cpu.DTYPES[dtype.name]


def _strides(x: np.ndarray) -> tuple[int, ...]:
    size = x.itemsize
    return tuple(stride // size for stride in x.strides)


def _copy_like(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    copy = np.empty_like(order)
    np.copyto(copy, x)
    return copy


memory = cpu.Memory(
    address=lambda x: x.ctypes.data,
    strides=_strides,
    sizes=lambda x: x.shape,
    empty_like=np.empty_like,
    empty_contiguous=lambda x: np.empty_like(x, order="C"),
    from_dlpack=lambda capsule: np.asarray(_Lent(capsule)),
    empty=lambda shape, x: np.empty(shape, wide(x)),
    empty_bytes=lambda size: np.empty(size, np.uint8),
    copy_like=_copy_like,
    dtype=lambda x: _number(x.dtype),
    item_bytes=lambda x: x.itemsize,
)
_memory_of_bfloat16 = memory._replace(from_dlpack=None)


def train(
    geometry: Geometry,
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    *,
    residual: np.ndarray | None,
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
    statistic_shape: tuple[int, ...] | None,
    out: np.ndarray | None,
) -> tuple[np.ndarray, Moments]:
    """`Engine.train` without a mask, for arrays of one dtype; y stands in `out`, where that is given."""
    axes, geometry, (x, residual) = _together(geometry, x, residual)
    target = _target(geometry, axes, out, x, residual, group_size)
    rest = residual, epsilon, negative_slope, group_size, target, statistic_shape
    y, saved = cpu.forward(_of(x), geometry, x, gamma, beta, *rest)
    return _delivered(y, axes, target, out), Moments(count(geometry, x, group_size), *saved.statistics)


def infer(
    geometry: Geometry,
    x: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    *,
    residual: np.ndarray | None,
    epsilon: float,
    negative_slope: float,
    out: np.ndarray | None,
) -> np.ndarray:
    """`Engine.infer` likewise; what float32 cannot hold of a float64 mean is taken along."""
    axes, geometry, (x, residual) = _together(geometry, x, residual)
    target = _target(geometry, axes, out, x, residual, None)
    mean, mean_low = _split(mean, wide(x))
    rest = residual, epsilon, negative_slope, target, mean_low
    return _delivered(cpu.inference(_of(x), geometry, x, mean, variance, gamma, beta, *rest), axes, target, out)


def moments(geometry: Geometry, x: np.ndarray) -> Moments:
    """Of shape (1, channel), in the precision that x is computed in."""
    _, geometry, (x,) = _together(geometry, x)
    statistics = halves.moments(_of(x), geometry, x)
    return Moments(count(geometry, x), *statistics)


def gradient(
    geometry: Geometry,
    dy: np.ndarray,
    x: np.ndarray,
    moments: Moments,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    residual: np.ndarray | None,
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
    d_mean: np.ndarray | None,
    d_variance: np.ndarray | None,
) -> Gradients:
    """The derivatives of `train`, by its moments of shape (groups, channel); all numbers per channel dense and wide."""
    axes, geometry, (x, dy, residual) = _together(geometry, x, dy, residual)
    rest = epsilon, negative_slope, group_size
    saved = halves.recalled(_of(x), geometry, x, moments[1:], gamma, beta, residual, *rest)
    g = cpu.backward(_of(x), geometry, dy, x, saved, gamma, beta, residual is not None, *rest, d_mean, d_variance)
    return g._replace(x=_apart(g.x, axes), residual=None if g.residual is None else _apart(g.residual, axes))


def _of(x: np.ndarray) -> cpu.Memory:
    return _memory_of_bfloat16 if _number(x.dtype) == cpu.DTYPES["bfloat16"] else memory


def _split(mean: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray | None]:
    """A mean as the nearest one of `dtype`, and the rest where there is one."""
    if mean.dtype == dtype:
        return np.ascontiguousarray(mean), None
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.ascontiguousarray(mean, dtype)
        return near, np.where(np.isfinite(near), mean - near, 0).astype(dtype)


Axes = tuple[int, ...] | None


def _together(geometry: Geometry, *arrays: np.ndarray | None) -> tuple[Axes, Geometry, list[Any]]:
    """Arrays that kernels can read, their channel axes beside each other; the exchange of axes that brought them there."""
    axes = geometry.permutation
    if axes is None:
        return None, geometry, [_readable(array) for array in arrays]
    moved = [None if array is None else array.transpose(axes) for array in arrays]
    shape = next(array.shape for array in moved if array is not None)
    return axes, Geometry(shape, range(-len(geometry.axis), 0)), [_readable(array) for array in moved]


def _apart(y: np.ndarray, axes: Axes) -> np.ndarray:
    return y if axes is None else y.transpose(np.argsort(axes))


def _readable(array: np.ndarray | None) -> np.ndarray | None:
    """The array, or a copy where its elements are not aligned or count backwards."""
    return array if array is None or _lies_well(array) else array.copy(order="K")


def _lies_well(array: np.ndarray) -> bool:
    size = array.itemsize
    return array.flags.aligned and all(step >= 0 and step % size == 0 for step in array.strides)


def _target(
    geometry: Geometry,
    axes: Axes,
    out: np.ndarray | None,
    x: np.ndarray,
    residual: np.ndarray | None,
    group_size: int | None,
) -> np.ndarray | None:
    """`out`, its axes exchanged like x's, if kernels can write there while they read x and residual; else None."""
    if out is None or not out.dtype.isnative or not _lies_well(out):
        return None
    moved = out if axes is None else out.transpose(axes)
    if overlap(moved, x) or overlap(moved, residual):
        return None
    return moved if halves.writable(memory, geometry, moved, group_size) else None


def _delivered(y: np.ndarray, axes: Axes, target: np.ndarray | None, out: np.ndarray | None) -> np.ndarray:
    """y with the axes of x, in `out` where that is given and y was not written there at once."""
    if out is None:
        return _apart(y, axes)
    if target is None:
        copy(_apart(y, axes), out)
    return out
