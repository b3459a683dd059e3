"""Run the compiled CPU kernels on NumPy arrays of any strides and channel axes, into new memory or into `out`."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from evennorm.core.activation import LINEAR
from evennorm.core.call import Call
from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.core.normalize import Gradients
from evennorm.kernels import choose
from evennorm.kernels.contract import ArrayAccess, Saved
from evennorm.kernels.cpu import CpuKernel, writable
from evennorm.kernels.parts import warn_once
from evennorm.numpy.arrays import copy, overlap, wide


class _Lent:
    """Memory of a buffer in the form that NumPy reads: `from_dlpack` makes read-only arrays, and knows no bfloat16."""

    def __init__(self, capsule: Any):
        self._capsule = capsule
        self._array = np.from_dlpack(self)
        self.__array_interface__ = {**self._array.__array_interface__, "data": (self._array.ctypes.data, False)}

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


@lru_cache(maxsize=16)
def supports(dtype: np.dtype) -> bool:
    warn_once("numpy")
    return choose("numpy", dtype.name) == "cpu"


def _strides(x: np.ndarray) -> tuple[int, ...]:
    size = x.itemsize
    return tuple(stride // size for stride in x.strides)


def _copy_like(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    copy = np.empty_like(order)
    np.copyto(copy, x)
    return copy


kernel = CpuKernel(
    ArrayAccess(
        address=lambda x: x.ctypes.data,
        strides=_strides,
        sizes=lambda x: x.shape,
        item_bytes=lambda x: x.itemsize,
        empty_like=np.empty_like,
        empty_contiguous=lambda x: np.empty_like(x, order="C"),
        empty=lambda shape, x: np.empty(shape, wide(x)),
        empty_bytes=lambda size, x: np.empty(size, np.uint8),
        copy_like=_copy_like,
        from_dlpack=lambda capsule: np.asarray(_Lent(capsule)),
    )
)
_kernel_of_bfloat16 = CpuKernel(kernel.access._replace(from_dlpack=None))


def train(
    call: Call,
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    residual: np.ndarray | None,
    out: np.ndarray | None,
) -> tuple[np.ndarray, Moments]:
    """Compute `Engine.train` without a mask, for arrays of one dtype; y is written to `out`, where that is given."""
    axes, call, (x, residual) = _together(call, x, residual)
    target = _target(call, axes, out, x, residual)
    y, saved = _kernel(call).forward(call, x, gamma, beta, residual, out=target)
    return _delivered(y, axes, target, out), Moments(call.count(x.shape), *saved[0])


def infer(
    call: Call,
    x: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    residual: np.ndarray | None,
    out: np.ndarray | None,
) -> np.ndarray:
    """Compute `Engine.infer` likewise, with the part of a float64 mean that float32 cannot hold."""
    axes, call, (x, residual) = _together(call, x, residual)
    target = _target(call, axes, out, x, residual)
    mean, mean_low = _split(mean, wide(x))
    y = _kernel(call).infer(call, x, mean, variance, gamma, beta, residual, mean_low=mean_low, out=target)
    return _delivered(y, axes, target, out)


def moments(call: Call, x: np.ndarray) -> Moments:
    """Return moments of shape (1, channel), in the precision that x is computed in."""
    _, call, (x,) = _together(call, x)
    return Moments(call.count(x.shape), *_kernel(call).moments(call, x))


def gradient(
    call: Call,
    dy: np.ndarray,
    x: np.ndarray,
    moments: Moments,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    residual: np.ndarray | None,
    d_mean: np.ndarray | None,
    d_variance: np.ndarray | None,
) -> Gradients:
    """Differentiate `train` by its moments of shape (groups, channel); all numbers per channel are dense and wide."""
    axes, call, (x, dy, residual) = _together(call, x, dy, residual)
    kernel, statistics = _kernel(call), np.stack(moments[1:])
    saved: Saved = statistics, None
    if residual is not None and call.activation != LINEAR:  # for the mask; y is dropped
        _, saved = kernel.forward(call, x, gamma, beta, residual, statistics=statistics)
    dx, d_gamma, d_beta, d_residual = kernel.backward(
        call, dy, x, gamma, beta, saved, residual is not None, d_mean, d_variance
    )
    return Gradients(_apart(dx, axes), d_gamma, d_beta, None if d_residual is None else _apart(d_residual, axes))


def _kernel(call: Call) -> CpuKernel:
    return _kernel_of_bfloat16 if call.dtype == "bfloat16" else kernel


def _split(mean: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray | None]:
    """Split a mean into the nearest one of `dtype`, and the rest where there is one."""
    if mean.dtype == dtype:
        return np.ascontiguousarray(mean), None
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.ascontiguousarray(mean, dtype)
        return near, np.where(np.isfinite(near), mean - near, 0).astype(dtype)


Axes = tuple[int, ...] | None


def _together(call: Call, *arrays: np.ndarray | None) -> tuple[Axes, Call, list[Any]]:
    """Return arrays that kernels can read, with adjacent channel axes, and the exchange of axes that made them so."""
    axes = call.geometry.permutation
    if axes is None:
        return None, call, [_readable(array) for array in arrays]
    moved = [None if array is None else array.transpose(axes) for array in arrays]
    shape = next(array.shape for array in moved if array is not None)
    geometry = Geometry(shape, range(-len(call.geometry.axis), 0))
    return axes, replace(call, geometry=geometry), [_readable(array) for array in moved]


def _apart(y: np.ndarray, axes: Axes) -> np.ndarray:
    return y if axes is None else y.transpose(np.argsort(axes))


def _readable(array: np.ndarray | None) -> np.ndarray | None:
    """Return the array, or a copy where its elements are not aligned or count backwards."""
    return array if array is None or _lies_well(array) else array.copy(order="K")


def _lies_well(array: np.ndarray) -> bool:
    size = array.itemsize
    return array.flags.aligned and all(step >= 0 and step % size == 0 for step in array.strides)


def _target(
    call: Call,
    axes: Axes,
    out: np.ndarray | None,
    x: np.ndarray,
    residual: np.ndarray | None,
) -> np.ndarray | None:
    """Return `out`, its axes exchanged like x's, if kernels can write there while they read x and residual; else None."""
    if out is None or not out.dtype.isnative or not _lies_well(out):
        return None
    moved = out if axes is None else out.transpose(axes)
    if overlap(moved, x) or overlap(moved, residual):
        return None
    return moved if writable(kernel.access, call, moved) else None


def _delivered(y: np.ndarray, axes: Axes, target: np.ndarray | None, out: np.ndarray | None) -> np.ndarray:
    """Return y with the axes of x, in `out` where that is given and y was not written there directly."""
    if out is None:
        return _apart(y, axes)
    if target is None:
        copy(_apart(y, axes), out)
    return out
