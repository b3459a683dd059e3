"""Check that an HDF5 file of unknown origin is safe to read.

The format can point outside itself, announce more than it holds, and keep one piece of data under many names.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from evennorm.errors import InputError, MissingExtra, first_line
from evennorm.tools.archives import FLOOR, check_growth
from evennorm.tools.hdf5_heaps import Heaps, references

_MOST_OBJECTS = 100_000
"""The most groups and data sets in one file; a network of a thousand layers has a tenth of it, its optimizer included."""
_DEFLATE, _SHUFFLE, _FLETCHER = 1, 2, 3
_UNPACKED = 1032
"""The most that DEFLATE grows."""
_PIECE = 1 << 24


def check_hdf5_file(file: str | os.PathLike[str] | io.BytesIO, name: str) -> None:
    """Look at every object, attribute and chunk of a file, so that reading any of them takes memory in proportion to the
    file.

    Raises:
        InputError: it is damaged, leads out of itself, or announces more than it holds.
        MissingExtra: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra("reading Keras models", "keras", "h5py") from error
    try:
        with h5py.File(file, "r") as opened, _Content(file) as content:
            _Check(opened, name, content).run()
    except InputError:
        raise
    except Exception as error:  # h5py raises many kinds, for what damage may cause
        raise InputError(f"{name} is damaged or cut short ({first_line(error)}); fetch or save it again") from error


class _Content:
    """The bytes of a file, mapped into memory where it lies on a disk."""

    def __init__(self, file: str | os.PathLike[str] | io.BytesIO):
        self._file = file

    def __enter__(self) -> Any:
        if isinstance(self._file, io.BytesIO):
            self._held: Any = None
            return self._file.getvalue()
        with open(self._file, "rb") as file:
            self._held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._held

    def __exit__(self, *_: object) -> None:
        if self._held is not None:
            self._held.close()


class _Check:
    """One open h5py.File, and what has been found in it so far."""

    def __init__(self, file: Any, name: str, content: Any):
        self.file, self.name = file, name
        self.size = len(content)
        self.heaps = Heaps(content, file.id.get_create_plist().get_userblock())
        self.announced = self.stored = 0

    def refuse(self, what: str) -> InputError:
        return InputError(f"{self.name} is not opened: {what}")

    def run(self) -> None:
        if self.file.id.get_create_plist().get_sizes() != (8, 8):
            raise self.refuse("its addresses are not of 8 bytes, as Keras writes them")
        elements = 0
        for place, found in self.objects():
            elements += self.attributes(place, found)
            if hasattr(found, "dtype"):
                self.dataset(place, found)
        if elements:
            self.grows("the text of its attributes", self.heaps.most(elements, FLOOR))
        if self.stored > self.size:
            raise self.refuse(
                f"its data sets store {self.stored:,} bytes, and it has {self.size:,}; they lie over each other"
            )
        self.grows("all of it", self.announced, self.stored)

    def grows(self, place: str, announced: int, stored: int | None = None) -> None:
        check_growth(self.name, place, announced, self.size if stored is None else min(stored, self.size))

    def objects(self) -> Iterator[tuple[str, Any]]:
        """Yield every group and data set, each once, with what to call it."""
        import h5py

        root = self.file["/"]
        waiting, seen = [root], {h5py.h5o.get_info(root.id).addr}
        yield "the file itself", root
        while waiting:
            group = waiting.pop()
            for key in group:
                link = group.get(key, getlink=True)
                place = f"its entry {group.name.rstrip('/')}/{key}"
                if isinstance(link, h5py.ExternalLink):
                    raise self.refuse(f"{place} leads out of the file")
                if isinstance(link, h5py.SoftLink):
                    raise self.refuse(f"{place} is a link, which Keras never writes")
                found = group[key]
                address = h5py.h5o.get_info(found.id).addr
                if address in seen:
                    raise self.refuse(f"{place} is another name for an object elsewhere in it, which Keras never writes")
                seen.add(address)
                if len(seen) > _MOST_OBJECTS:
                    raise self.refuse(f"it holds more than {_MOST_OBJECTS:,} groups and data sets")
                if isinstance(found, h5py.Group):
                    waiting.append(found)
                yield place, found

    def attributes(self, place: str, found: Any) -> int:
        """Return the number of elements of variable length in the attributes of an object."""
        elements = 0
        for key in found.attrs:
            attribute = found.attrs.get_id(key)
            count = math.prod(attribute.shape or ())
            if count * attribute.dtype.itemsize > max(self.size, 1 << 16):
                raise self.refuse(f"the attribute {key!r} of {place} announces {count:,} values, more than the file holds")
            elements += count * references(attribute.dtype)
        return elements

    def dataset(self, place: str, found: Any) -> None:
        if found.external or found.is_virtual:
            raise self.refuse(f"{place} keeps its data in other files")
        stored, count = found.id.get_storage_size(), math.prod(found.shape or ())
        self.grows(place, count * found.dtype.itemsize, stored)
        self.announced, self.stored = self.announced + count * found.dtype.itemsize, self.stored + stored
        if found.chunks is not None:  # of which one is read as a whole
            self.grows(place, math.prod(found.chunks) * found.dtype.itemsize, stored)
            self.chunks(place, found)
        if references(found.dtype):
            self.announced += self.variable(place, found)

    def chunks(self, place: str, found: Any) -> None:
        """Check the chunks of a data set: HDF5 unpacks a chunk to its end, whatever its shape says."""
        settings = found.id.get_create_plist()
        filters = [settings.get_filter(number)[0] for number in range(settings.get_nfilters())]
        if set(filters) - {_DEFLATE, _SHUFFLE, _FLETCHER} or len(set(filters)) < len(filters):
            raise self.refuse(
                f"{place} is packed by filters {filters}; only gzip, once, is read; write it again by h5repack"
            )
        if _DEFLATE not in filters:
            return
        whole = math.prod(found.chunks) * found.id.get_type().get_size() + 4 * filters.count(_FLETCHER)
        large: list[Any] = []

        def look(chunk: Any) -> None:
            if chunk.size * _UNPACKED > FLOOR and not chunk.filter_mask & 1 << filters.index(_DEFLATE):
                large.append(chunk)

        found.id.chunk_iter(look)
        for chunk in large:
            if chunk.size > self.size:
                raise self.refuse(f"{place} announces a chunk of {chunk.size:,} bytes, and the file has {self.size:,}")
            if _unpacks_beyond(found.id.read_direct_chunk(chunk.chunk_offset)[1], whole):
                raise self.refuse(f"{place} unpacks to more than the {whole:,} bytes of its chunks, as bombs do")

    def variable(self, place: str, found: Any) -> int:
        """Return the bytes of a data set whose elements have their own lengths, reading a few at a time."""
        step = max(1, _PIECE // max(self.heaps.largest, 1))
        total = 0
        for part in _parts(found, step):
            total += sum(_held(value) for value in np.ravel(part))
            self.grows(place, total)
        return total


def _parts(found: Any, step: int) -> Iterator[Any]:
    """Yield a data set in pieces of at most `step` elements, or of one row along the last axis."""
    if not found.shape:
        yield found[()]
        return
    *outer, last = found.shape
    for position in np.ndindex(*outer):
        for start in range(0, last, step):
            yield found[(*position, slice(start, start + step))]


def _held(value: Any) -> int:
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, np.ndarray):
        return value.nbytes if value.dtype.kind != "O" else sum(map(_held, value.ravel()))
    if isinstance(value, np.void) and value.dtype.names:
        return sum(_held(value[field]) for field in value.dtype.names)
    return 8


def _unpacks_beyond(packed: bytes, size: int) -> bool:
    unpacker, unpacked, rest = zlib.decompressobj(), 0, packed
    while rest and unpacked <= size and not unpacker.eof:
        unpacked += len(unpacker.decompress(rest, _PIECE))
        rest = unpacker.unconsumed_tail
    return unpacked > size
