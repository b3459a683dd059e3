"""Bound how much the strings and arrays of variable length in an HDF5 file can be when they are read.

They lie in collections, and are read by references, of which any number may name the same piece. HDF5 reads an attribute as
a whole, and says its size only afterwards; so references are counted in the file's own bytes.
Source: HDF5 File Format Specification 3.0, III.E and III.G.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

_MOST_SEARCHES = 64
"""The most large pieces that are looked for one by one; an honest file has a configuration or two."""


def references(dtype: np.dtype) -> int:
    """Return how many references one element of a type holds, at least one where it may hold any number.

    Example:
        >>> references(np.dtype([("name", "O"), ("value", "f4")])), references(np.dtype("f4"))
        (1, 0)
    """
    if dtype.subdtype is not None:
        inner, shape = dtype.subdtype
        return references(inner) * int(np.prod(shape))
    if dtype.names is not None:
        return sum(references(dtype[name]) for name in dtype.names)
    return int(dtype.kind == "O")


class Heaps:
    """The collections of one file, searched when they are first needed."""

    def __init__(self, content: Any, base: int):
        self._content, self._base = content, base
        self._found: list[tuple[int, int, int]] | None = None

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """Size, address of the collection and number in it, of each piece."""
        if self._found is None:
            self._found = list(self._pieces())
        return self._found

    @property
    def largest(self) -> int:
        return max((size for size, _, _ in self.pieces), default=0)

    def most(self, elements: int, harmless: int) -> int:
        """Return the most bytes that this many references in attributes can stand for."""
        if elements * self.largest <= harmless:
            return elements * self.largest
        small = harmless // elements
        large = [piece for piece in self.pieces if piece[0] > small]
        if len(large) > _MOST_SEARCHES or self._has_packed_attributes():
            return elements * self.largest
        return sum(size * self._count(struct.pack("<QI", address, number)) for size, address, number in large)

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        content, at = self._content, self._content.find(b"GCOL\x01")
        while at >= 0:
            end = min(at + int.from_bytes(content[at + 8 : at + 16], "little"), len(content))
            piece = at + 16
            while piece + 16 <= end:
                number, size = struct.unpack("<H6xQ", content[piece : piece + 16])
                if number == 0:  # what is free
                    break
                yield min(size, end - piece), at - self._base, number
                piece += 16 + -(-size // 8) * 8
            at = content.find(b"GCOL\x01", at + 5)

    def _count(self, pattern: bytes) -> int:
        count, at = 0, self._content.find(pattern)
        while at >= 0:
            count, at = count + 1, self._content.find(pattern, at + 1)
        return count

    def _has_packed_attributes(self) -> bool:
        """Return whether a heap that may hold attributes is compressed, so that references in it cannot be counted."""
        content, at = self._content, self._content.find(b"FRHP\0")
        while at >= 0:
            if content[at + 7 : at + 9] != b"\0\0":
                return True
            at = content.find(b"FRHP\0", at + 5)
        return False
