"""Read batches of rows from arrays, .npy and .npz files without loading the files whole.

Uncompressed arrays of a .npz file are mapped into memory; compressed ones are unpacked as they are read, row after row.
"""

from __future__ import annotations

import gzip
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evennorm.errors import InputError, first_line, reason_of
from evennorm.tools.archives import check_growth, check_zip
from evennorm.tools.data.batch import Batch, Data, leaves, mapped, ranges

X = ("x", "x_train", "inputs", "X")
Y = ("y", "y_train", "labels", "Y")
OTHERS = ("weights", "sample_weight", "x_test", "y_test", "x_validation", "y_validation")
"""Names of arrays that no statistic is computed from."""
_BROKEN = (
    *(ValueError, OSError, EOFError, KeyError, AttributeError, RuntimeError, TypeError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error, lzma.LZMAError),
)
_MOST_AXES = 32
_BYTES = 8
"""The type of IDX files that hold bytes."""


@dataclass(frozen=True)
class CompressedArray:
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

    def whole(self) -> np.ndarray:
        """Return the whole array. Its checksum is checked at the end of the member."""
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            _header(file)
            return np.frombuffer(file.read(), self.dtype).reshape(self.shape)


def open_npy(path: Path) -> Data:
    """Open an .npy file as data.

    Raises:
        InputError: the file is damaged, or holds Python objects.
    """
    return from_arrays(str(path), {"x": mapped_npy(path)})


def mapped_npy(path: Path) -> np.ndarray:
    """Map an .npy file into memory.

    Raises:
        InputError: the file is damaged, or holds Python objects.
    """
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype, header = _header(file)
        _check_plain(str(path), dtype)
        held = os.path.getsize(path) - header
        if held < dtype.itemsize * _size(shape):
            raise ValueError(_lie(dtype, shape, held))
        if not _size(shape):
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", header, shape, "F" if fortran else "C")
    except _BROKEN as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a readable .npy file ({_why(error)}); write it again with numpy.save") from error


def open_npz(path: Path) -> Data:
    """Open an .npz file as data.

    Raises:
        InputError: the file is damaged, holds Python objects, or no x.
    """
    return from_arrays(str(path), npz_arrays(path))


def npz_arrays(path: Path, mapped: bool = True) -> dict[str, Any]:
    """Return the arrays of a `.npz` file by their names, most of them unread: in memory, mapped, or `CompressedArray`.

    Args:
        path: of the file.
        mapped: whether what lies in the file as it is may be mapped, which leaves its check sum aside.

    Raises:
        InputError: the file is damaged, announces more than it holds, or holds Python objects.
    """
    with _refusing(path), zipfile.ZipFile(path) as archive:
        check_zip(archive, str(path))
        return {
            member.filename.removesuffix(".npy"): _member(path, archive, member, mapped)
            for member in archive.infolist()
            if member.filename.endswith(".npy")
        }


def read_npz(path: Path, keys: Sequence[str], which: str = "") -> list[np.ndarray]:
    """Return some arrays of a `.npz` file, read whole and checked against their checksums. `which` describes them in the
    error.

    Raises:
        InputError: the file is damaged, announces more than it holds, holds Python objects, or lacks one of them.
    """
    arrays = npz_arrays(path, mapped=False)
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise InputError(
            f"{path} must hold the arrays {', '.join(keys)}{which and f', {which}'}; "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; it holds {', '.join(arrays) or 'nothing'}"
        )
    with _refusing(path):
        return [array.whole() if isinstance(array, CompressedArray) else array for array in (arrays[key] for key in keys)]


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Say in one line what NumPy and zipfile find wrong about a `.npz` file."""
    try:
        yield
    except _BROKEN as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a readable .npz file ({_why(error)}); write it again with numpy.savez") from error


def idx_array(path: Path) -> np.ndarray:
    """Return the bytes of an IDX file, the format of MNIST, gzipped or not (https://yann.lecun.com/exdb/mnist).

    Raises:
        InputError: it is damaged, announces more than it holds, or holds something else than bytes.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            zeros, kind, rank = struct.unpack(">HBB", file.read(4))
            sizes = struct.unpack(f">{rank}I", file.read(4 * rank))
            count = _size(sizes)
            check_growth(str(path), "its header", count, os.path.getsize(path))
            values = file.read(count + 1)
    except _BROKEN as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a readable IDX file ({_why(error)}); fetch it again") from error
    if zeros != 0 or kind != _BYTES or len(values) != count or not 1 <= rank <= _MOST_AXES:
        follow = f"{'more' if len(values) > count else f'{len(values):,}'} values follow"
        raise InputError(
            f"{path} is not a whole IDX file of bytes: its header says type {kind} and sizes {sizes}, {follow}; fetch "
            "it again"
        )
    return np.frombuffer(values, np.uint8).reshape(sizes)


def from_arrays(name: str, arrays: Mapping[str, Any]) -> Data:
    """Return data from arrays by their names; x may be a structure of arrays.

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
    if any(0 in array.shape for array in leaves(x)):
        raise InputError(f"{name} is empty: its samples hold no values; received {_shapes(x)} as x")

    def read(size: int, limit: int | None) -> Iterator[Batch]:
        wanted = ranges(samples, size, limit)
        parts = [_rows(name, array, wanted) for array in [*leaves(x), *leaves(() if y is None else y)]]
        for rows in zip(*parts, strict=True):
            ahead = iter(rows)
            yield Batch(mapped(lambda _: next(ahead), x), None if y is None else mapped(lambda _: next(ahead), y))  # noqa: B023

    return Data(name, samples, y is not None, read)


def _rows(name: str, array: Any, wanted: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    if not isinstance(array, CompressedArray):
        yield from (np.asarray(array[start:stop]) for start, stop in wanted)
        return
    try:
        yield from array.rows(wanted)
    except _BROKEN as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is damaged ({_why(error)}); write it again with numpy.savez") from error


def _array(value: Any) -> Any:
    if isinstance(value, np.ndarray | CompressedArray):
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, mapped: bool = True) -> Any:
    """Return one array of a .npz file, not read yet."""
    with archive.open(member) as file:
        shape, fortran, dtype, header = _header(file)
    _check_plain(f"{path}: {member.filename!r}", dtype)
    if member.file_size - header != dtype.itemsize * _size(shape):
        lie = _lie(dtype, shape, member.file_size - header)
        raise InputError(f"{path} is damaged: {member.filename!r} {lie}; write it again with numpy.savez")
    if mapped and member.compress_type == zipfile.ZIP_STORED and _size(shape):
        with open(path, "rb") as file:
            file.seek(member.header_offset + 26)
            lengths = file.read(4)
        start = member.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        return np.memmap(path, dtype, "r", start + header, shape, "F" if fortran else "C")
    if fortran or not shape or not _size(shape):
        with archive.open(member) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    return CompressedArray(path, member.filename, shape, dtype)


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except Exception as error:  # NumPy parses it as Python, which may fail in many ways
        raise ValueError(f"its header is broken: {first_line(error)}") from error
    if len(shape) > _MOST_AXES or any(size < 0 for size in shape):
        raise ValueError(f"its header is broken: no array has the shape {str(shape)[:80]}")
    return shape, fortran, dtype, file.tell()


def _check_plain(what: str, dtype: np.dtype) -> None:
    if dtype.hasobject:
        raise InputError(f"{what} is not opened: it holds pickled Python objects; write arrays of numbers")
    if dtype.itemsize == 0:
        raise InputError(f"{what} is not opened: values of {dtype} take no space, so any number of them would fit")


def _lie(dtype: np.dtype, shape: tuple[int, ...], held: int) -> str:
    return f"announces {dtype} of shape {shape}, and holds {held:,} bytes"


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(map(int, shape))


def _skip(file: Any, count: int) -> None:
    while count:
        count -= len(file.read(min(count, 1 << 22))) or count


def _shapes(x: Any) -> str:
    return ", ".join(str(array.shape) for array in leaves(x))


def _why(error: BaseException) -> str:
    text = reason_of(error) if isinstance(error, zipfile.BadZipFile | ValueError) else first_line(error)
    return (
        "it holds pickled Python objects" if "pickle" in text or "Python objects" in text else text.replace(os.linesep, " ")
    )
