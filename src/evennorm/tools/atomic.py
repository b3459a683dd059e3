"""A path and text go in; a file that is either complete or untouched comes out."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from evennorm.errors import InputError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8 beside `path` first and moves it there when it is whole; a file that was there is replaced.

    Raises:
        InputError: the file cannot be written; what was at `path` is as it was.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp(), "note.txt")
        >>> write_text(target, "whole")
        >>> target.read_text(), [p.name for p in target.parent.iterdir()]
        ('whole', ['note.txt'])
    """
    target = Path(path)
    partial = None
    try:
        real = target.resolve()
        if real.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        partial = real.with_name(f".{token_hex(8)}.part")
        with open(partial, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(real)
    except (OSError, ValueError) as error:
        if partial is not None:
            with suppress(OSError):
                partial.unlink()
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot write {os.fspath(path)!r}: {reason}; choose a file in a folder that takes new files"
        ) from None
