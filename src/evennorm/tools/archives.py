"""Check that a zip or HDF5 file of unknown origin is safe to read.

Both formats can point outside themselves, and both can announce more than they hold.
"""

from __future__ import annotations

import math
import stat
import zipfile
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from evennorm.errors import InputError, MissingExtra, first_line

_FLOOR = 1 << 28
"""Bytes below which no announced size is called a bomb."""
_EXPANSION = 100
"""How many times what is stored an honest member may grow; weights hardly compress, and DEFLATE reaches 1032."""


def check_zip(archive: zipfile.ZipFile, name: str) -> None:
    """
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
    # Members may share what is stored, so that their own sizes say nothing of the file's.
    stored = min(sum(member.compress_size for member in members), _size_of(archive))
    check_growth(name, "all of it", sum(member.file_size for member in members), stored)


def _size_of(archive: zipfile.ZipFile) -> int:
    file: Any = archive.fp
    at = file.tell()
    size = file.seek(0, 2)
    file.seek(at)
    return size


def check_hdf5(file: Any, name: str) -> None:
    """The same for an open h5py.File: no link to other files, no data kept elsewhere, no size that nothing stands behind.

    Raises:
        InputError: it does one of these.
    """
    import h5py

    waiting, seen, announced, stored = [file["/"]], set(), 0, 0
    while waiting:
        group = waiting.pop()
        for key in group:
            link = group.get(key, getlink=True)
            place = f"its entry {group.name.rstrip('/')}/{key}"
            if isinstance(link, h5py.ExternalLink):
                raise InputError(f"{name} is not opened: {place} leads out of the file")
            if isinstance(link, h5py.SoftLink):
                raise InputError(f"{name} is not opened: {place} is a link, which Keras never writes")
            found = group[key]
            address = h5py.h5o.get_info(found.id).addr
            if address in seen:
                continue
            seen.add(address)
            if isinstance(found, h5py.Group):
                waiting.append(found)
            elif isinstance(found, h5py.Dataset):
                if found.external or found.is_virtual:
                    raise InputError(f"{name} is not opened: {place} keeps its data in other files")
                size = found.id.get_storage_size()
                check_growth(name, place, found.nbytes, size)
                if found.chunks is not None:  # of which one is read as a whole
                    check_growth(name, place, math.prod(found.chunks) * found.dtype.itemsize, size)
                announced, stored = announced + found.nbytes, stored + size
    check_growth(name, "all of it", announced, stored)


def check_hdf5_file(file: Any, name: str) -> None:
    """`check_hdf5` of a path or file object.

    Raises:
        InputError: it is damaged, or unsafe.
        MissingExtra: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingExtra("reading Keras models", "keras", "h5py") from error
    try:
        with h5py.File(file, "r") as opened:
            check_hdf5(opened, name)
    except InputError:
        raise
    except Exception as error:  # h5py raises many kinds, for what damage may cause
        raise InputError(f"{name} is damaged or cut short ({first_line(error)}); fetch or save it again") from error


def check_growth(name: str, place: str, announced: int, stored: int) -> None:
    """
    Raises:
        InputError: far more is announced than is stored.
    """
    if announced > max(_FLOOR, _EXPANSION * stored):
        raise InputError(
            f"{name} is not opened: {place} announces {announced / 1e6:,.0f} MB and stores {stored / 1e6:,.1f}, as bombs do"
        )
