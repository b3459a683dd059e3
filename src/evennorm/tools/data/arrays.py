"""Arrays, .npy and .npz files go in; batches of their rows come out, read from the file where they lie.

What lies in a .npz file as it is, is mapped into memory; what is compressed is unpacked as it is read, row after row.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evennorm.errors import InputError, first_line
from evennorm.tools.archives import check_zip
from evennorm.tools.data.batch import Batch, Data, leaves, mapped, ranges

X = ("x", "x_train", "inputs", "X")
Y = ("y", "y_train", "labels", "Y")
OTHERS = ("weights", "sample_weight", "x_test", "y_test", "x_validation", "y_validation")
"""Arrays that no statistic is taken of."""
_BROKEN = (ValueError, OSError, EOFError, KeyError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Packed:
    """An array inside a compressed .npz file, which can only be read from its beginning."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def rows(self, wanted: list[tuple[int, int]]) -> Iterator[np.ndarray]:
        row = self.dtype.itemsize * _size(self.shape[1:])
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            _header(file)
            at = 0
            for start, stop in wanted:
                if start < at:  # batches from all over may overlap where there are few samples
                    raise InputError(f"{self.path}: ask for fewer batches, or for all")
                _skip(file, (start - at) * row)
                content = file.read((stop - start) * row)
                yield np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])
                at = stop


def open_npy(path: Path) -> Data:
    """
    Raises:
        InputError: the file is damaged, or holds Python objects.
    """
    return from_arrays(str(path), {"x": mapped_npy(path)})


def mapped_npy(path: Path) -> np.ndarray:
    """
    Raises:
        InputError: the file is damaged, or holds Python objects.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except _BROKEN as error:
        raise InputError(f"{path} is not a readable .npy file ({_why(error)}); write it again with numpy.save") from error


def open_npz(path: Path) -> Data:
    """
    Raises:
        InputError: the file is damaged, holds Python objects, or no x.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_zip(archive, str(path))
            arrays = {
                member.filename.removesuffix(".npy"): _member(path, archive, member)
                for member in archive.infolist()
                if member.filename.endswith(".npy")
            }
    except _BROKEN as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a readable .npz file ({_why(error)}); write it again with numpy.savez") from error
    return from_arrays(str(path), arrays)


def from_arrays(name: str, arrays: Mapping[str, Any]) -> Data:
    """Data of arrays by their names; x may be a structure of arrays.

    Raises:
        InputError: there is no x, sizes differ, or an array is of Python objects.
    """
    if not arrays:
        raise InputError(f"{name} holds no array; it needs x, the samples")
    x = next((arrays[key] for key in X if key in arrays), None)
    y = next((arrays[key] for key in Y if key in arrays and arrays[key] is not None), None)
    if x is None:
        x = {key: value for key, value in arrays.items() if key not in (*Y, *OTHERS)}
        if not x:
            raise InputError(f"{name} must hold the samples as x; it holds {', '.join(arrays)}")
    x, y = mapped(_array, x), y if y is None else mapped(_array, y)
    sizes = set()
    for array in [*leaves(x), *leaves(() if y is None else y)]:
        if array.dtype.kind == "O":
            raise InputError(f"{name} holds an array of Python objects; samples are arrays of numbers of one shape")
        if len(array.shape) == 0:
            raise InputError(f"{name} holds a single number where samples are needed; their first axis counts them")
        sizes.add(array.shape[0])
    if len(sizes) > 1:
        raise InputError(
            f"{name} must have one label for each sample and as many of each input; received {_shapes(x)} as x"
            + ("" if y is None else f" and {_shapes(y)} as y")
        )
    samples = sizes.pop()
    if samples == 0:
        raise InputError(f"{name} is empty: it has 0 samples; statistics need some")

    def read(size: int, limit: int | None) -> Iterator[Batch]:
        wanted = ranges(samples, size, limit)
        parts = [_rows(name, array, wanted) for array in [*leaves(x), *leaves(() if y is None else y)]]
        for rows in zip(*parts, strict=True):
            ahead = iter(rows)
            yield Batch(mapped(lambda _: next(ahead), x), None if y is None else mapped(lambda _: next(ahead), y))  # noqa: B023

    return Data(name, samples, y is not None, read)


def _rows(name: str, array: Any, wanted: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    if not isinstance(array, Packed):
        yield from (np.asarray(array[start:stop]) for start, stop in wanted)
        return
    try:
        yield from array.rows(wanted)
    except _BROKEN as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is damaged ({_why(error)}); write it again with numpy.savez") from error


def _array(value: Any) -> Any:
    if isinstance(value, np.ndarray | Packed):
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    """One array of a .npz file, not read yet."""
    with archive.open(member) as file:
        shape, fortran, dtype, header = _header(file)
    if dtype.hasobject:
        raise InputError(f"{path} is not opened: {member.filename!r} holds pickled Python objects; write arrays of numbers")
    if member.file_size - header != dtype.itemsize * _size(shape):
        raise InputError(
            f"{path} is damaged: {member.filename!r} announces {dtype} of shape {shape}, and holds "
            f"{member.file_size - header:,} bytes; write it again with numpy.savez"
        )
    if member.compress_type == zipfile.ZIP_STORED and _size(shape):
        with open(path, "rb") as file:
            file.seek(member.header_offset + 26)
            lengths = file.read(4)
        start = member.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        return np.memmap(path, dtype, "r", start + header, shape, "F" if fortran else "C")
    if fortran or not shape or not _size(shape):
        with archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    return Packed(path, member.filename, shape, dtype)


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, fortran, dtype, file.tell()


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(map(int, shape))


def _skip(file: Any, count: int) -> None:
    while count:
        count -= len(file.read(min(count, 1 << 22))) or count


def _shapes(x: Any) -> str:
    return ", ".join(str(array.shape) for array in leaves(x))


def _why(error: BaseException) -> str:
    text = first_line(error)
    return (
        "it holds pickled Python objects" if "pickle" in text or "Python objects" in text else text.replace(os.linesep, " ")
    )
