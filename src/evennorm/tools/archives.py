"""Check that a zip file of unknown origin is safe to read.

The format can point outside itself, and it can announce more than it holds.
"""

from __future__ import annotations

import stat
import zipfile
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from evennorm.errors import InputError

FLOOR = 1 << 28
"""Bytes below which no announced size is called a bomb."""
_EXPANSION = 100
"""How many times what is stored an honest member may grow; weights hardly compress, and DEFLATE reaches 1032."""


def check_zip(archive: zipfile.ZipFile, name: str) -> None:
    """Refuse a zip file that is not safe to read.

    Raises:
        InputError: a member that lies outside the archive, is a link, stands there twice, or grows without measure.
    """
    seen = set()
    members = archive.infolist()
    for member in members:
        path = PurePosixPath(member.filename)
        outside = (
            path.is_absolute() or ".." in path.parts or PureWindowsPath(member.filename).drive or "\\" in member.filename
        )
        if outside or stat.S_ISLNK(member.external_attr >> 16):
            raise InputError(f"{name} is not opened: its member {member.filename!r} leads out of the file")
        if member.filename in seen:
            raise InputError(f"{name} is not opened: it holds {member.filename!r} twice, and readers may see either")
        seen.add(member.filename)
        check_growth(name, f"its member {member.filename!r}", member.file_size, member.compress_size)
    # Members may share stored bytes, so their own sizes say nothing about the file's.
    stored = min(sum(member.compress_size for member in members), _size_of(archive))
    check_growth(name, "all of it", sum(member.file_size for member in members), stored)


def _size_of(archive: zipfile.ZipFile) -> int:
    file: Any = archive.fp
    at = file.tell()
    size = file.seek(0, 2)
    file.seek(at)
    return size


def check_growth(name: str, place: str, announced: int, stored: int) -> None:
    """Refuse data that announces far more than the file stores.

    Raises:
        InputError: far more is announced than is stored.
    """
    if announced > max(FLOOR, _EXPANSION * stored):
        raise InputError(
            f"{name} is not opened: {place} announces {announced / 1e6:,.0f} MB and stores {stored / 1e6:,.1f}, as bombs do"
        )
