"""Decide which files a command may write, by one rule for all commands."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evennorm.errors import InputError
from evennorm.tools.atomic import check_place

_START = 4096
"""Bytes of a file by which its kind is told."""

_KINDS = {
    ".html": "HTML page",
    ".htm": "HTML page",
    ".json": "JSON file",
    ".svg": "SVG figure",
    ".png": "PNG picture",
    ".csv": "table of runs",
    ".keras": "Keras model",
    ".h5": "HDF5 file",
    ".pt": "file of torch",
    ".pth": "file of torch",
    ".pt2": "program of torch",
    ".safetensors": "safetensors file",
}


@dataclass(frozen=True)
class Output:
    """A file that a command was asked to write."""

    option: str
    """The option as the user gave it: -o, --html."""
    path: str | os.PathLike[str] | None
    """The path; None where the option was not given."""
    suffixes: tuple[str, ...]
    """Suffixes of the kinds that are written; empty where another check knows them."""


def check_outputs(outputs: Iterable[Output], inputs: Mapping[str, Any], force: bool = False) -> None:
    """Check the files that a command is asked to write, before it works.

    An input is never overwritten, whatever links lead to it. A file that is there is overwritten where it is of the kind
    that is written, is empty, or `force` is set.

    Args:
        outputs: what is to be written.
        inputs: what is read, by option or argument: paths; None and everything that is no path of a file or folder is passed
            over.
        force: overwrite files of other kinds too.

    Raises:
        InputError: one of them must not be written, or cannot.

    Example:
        >>> check_outputs([Output("--html", "net.py", (".html",))], {})
        Traceback (most recent call last):
        evennorm.errors.InputError: --html writes a file that ends with .html; received 'net.py'
    """
    for output in outputs:
        if output.path is None:
            continue
        path = Path(output.path)
        shown = os.fspath(output.path)
        check_place(path)
        if output.suffixes and path.suffix.lower() not in output.suffixes:
            raise InputError(
                f"{output.option} writes a file that ends with {' or '.join(output.suffixes)}; received {shown!r}"
            )
        refuse_inputs(path, inputs, output.option)
        if not path.exists():
            continue
        if not path.is_file():
            raise InputError(f"{output.option} {shown!r} is no regular file; name another")
        kind = _KINDS.get(path.suffix.lower())
        if not force and kind is not None and not is_of_kind(path, path.suffix.lower()):
            raise InputError(
                f"{output.option} {shown!r} exists and is no {kind}; name another file, or overwrite it with --force"
            )


def refuse_inputs(output: str | os.PathLike[str], inputs: Mapping[str, Any], option: str = "the output") -> None:
    """Refuse an output that would overwrite an input; links are resolved.

    Args:
        output: the path of a file, or of a folder in which files are written.
        inputs: see `check_outputs`.

    Raises:
        InputError: the output is an input, or lies among the files of one that is a folder.
    """
    path = Path(output)
    for name, given in inputs.items():
        if not isinstance(given, str | os.PathLike) or not os.path.exists(given):
            continue
        if _is_part(path, Path(given)):
            raise InputError(
                f"{option} {os.fspath(output)!r} is {name} itself, or a file of it, and an input is never overwritten; name "
                "another file"
            )


def _is_part(output: Path, given: Path) -> bool:
    if not output.exists():
        return output.resolve() == given.resolve()
    if os.path.samefile(output, given):
        return True
    if not given.is_dir() or not output.is_file():
        return False
    if given.resolve() in output.resolve().parents:
        return True
    if output.stat().st_nlink == 1:
        return False
    files = (os.path.join(folder, name) for folder, _, names in os.walk(given) for name in names)
    return any(os.path.samefile(output, file) for file in files if os.path.exists(file))


def is_of_kind(path: Path, suffix: str) -> bool:
    """Return whether an existing file is what its suffix says, by its first bytes; an empty one is of every kind."""
    try:
        with open(path, "rb") as file:
            start = file.read(_START)
    except OSError as error:
        raise InputError(f"cannot look at {os.fspath(path)!r}, which is there: {error.strerror}") from error
    if not start:
        return True
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    match suffix:
        case ".html" | ".htm":
            return text.startswith((b"<!doctype html", b"<html"))
        case ".svg":
            return text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text)
        case ".json":
            return text.startswith((b"{", b"["))
        case ".png":
            return start.startswith(b"\x89PNG\r\n\x1a\n")
        case ".csv":
            return b"\0" not in start and b"," in start.split(b"\n", 1)[0]
        case ".h5" | ".hdf5":
            return start.startswith(b"\x89HDF\r\n\x1a\n")
        case ".keras":
            return _has_member(path, "config.json")
        case ".pt" | ".pth" | ".pt2":
            return start.startswith(b"\x80") or _has_member(path, "data.pkl", "byteorder", "archive_format", "version")
        case ".safetensors":
            return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    return False


def _has_member(path: Path, *names: str) -> bool:
    """Return whether a file is a zip file with a member of one of these names, in any folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(member.rsplit("/", 1)[-1] in names for member in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
        return False
