"""Turn what a caller passes into arrays that kernels can compute with, or say why that is not possible."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from evennorm.core.call import refuse_complex
from evennorm.errors import ArgumentError, ShapeError
from evennorm.kernels.cpu import DTYPES


def floats(name: str, value: Any) -> np.ndarray:
    """Return `value` as an array of one of the float dtypes, in native byte order.

    Raises:
        ArgumentError: another dtype, or a masked array, whose mask an array would lose.
    """
    if type(value) is np.ndarray and _taken(value.dtype):
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise ArgumentError(
            f"{name} is a plain array; received a masked one; pass {name}.data, and to hide values mask=~{name}.mask"
        )
    array = np.asarray(value)
    refuse_complex(**{name: array})
    if array.dtype.name not in DTYPES:
        known = ", ".join(DTYPES)
        raise ArgumentError(
            f"{name} is an array of {known}; received dtype {array.dtype}; convert it, such as by {name}.astype('float32')"
        )
    return native(array)


@lru_cache(maxsize=16)
def _taken(dtype: np.dtype) -> bool:
    return dtype.isnative and dtype.name in DTYPES


def native(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def wide(x: np.ndarray) -> np.dtype:
    """Return the dtype that `x` is computed in."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def exact(mean: Any, x: np.ndarray) -> np.dtype:
    """Return the dtype in which a given mean keeps its value: 100000.001 in float64 is not rounded for float32 data."""
    dtype = np.asarray(mean).dtype
    return wide(x) if dtype.name in ("float32", "float16", "bfloat16") else np.dtype(np.float64)


def parameter(value: Any, dtype: np.dtype, *, own: bool = False) -> Any:
    """Return gamma, beta or a statistic as a dense array; with `own`, in memory that writing y cannot change."""
    return None if value is None else np.array(value, dtype, order="C", copy=own or None)


def checked_out(out: Any, x: np.ndarray) -> np.ndarray | None:
    """Return `out` as a plain array, if y can be written there.

    Raises:
        ArgumentError: it is no array, read-only, or of another dtype than y.
        ShapeError: of another shape.
    """
    if out is None:
        return None
    rule = "out is a writable array of x's shape and dtype"
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise ArgumentError(f"{rule}; received a {type(out).__name__}; leave it out to have y in new memory")
    if out.shape != x.shape:
        raise ShapeError(f"{rule}, {x.shape}; received shape {out.shape}")
    if native_dtype(out) != x.dtype:
        raise ArgumentError(f"{rule}, {x.dtype}; received dtype {out.dtype}")
    if not out.flags.writeable:
        raise ArgumentError(f"{rule}; received one that is read-only; open a memmap with mode 'r+' or copy the array")
    return np.asarray(out)


def native_dtype(array: np.ndarray) -> np.dtype:
    return array.dtype if array.dtype.isnative else array.dtype.newbyteorder("=")


def copy(y: np.ndarray, out: np.ndarray | None) -> None:
    if out is not None:
        np.copyto(out, y)


def overlap(out: np.ndarray, read: np.ndarray | None) -> bool:
    """Return whether writing `out` could change elements of an array that are still to be read. Sharing exactly the same
    elements is safe."""
    if read is None or not np.may_share_memory(out, read):
        return False
    return out.ctypes.data != read.ctypes.data or out.strides != read.strides
