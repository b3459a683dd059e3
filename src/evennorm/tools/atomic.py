"""Write files completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from evennorm.errors import InputError
from evennorm.tools.interrupts import stop_if_interrupted


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a fresh path beside `path`, of the same suffix, and move what was written there to `path` at the end.

    Where the body raises, what was at `path` is as it was and nothing is left beside it.

    Raises:
        InputError: the file cannot be written, or the body wrote none.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp(), "model.bin")
        >>> with replacing(target) as partial:
        ...     _ = partial.write_bytes(b"whole")
        >>> target.read_bytes(), [p.name for p in target.parent.iterdir()]
        (b'whole', ['model.bin'])
    """
    target = Path(path)
    partial = None
    try:
        real = _place(target)
        partial = real.with_name(f".{token_hex(8)}.part{real.suffix}")
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        stop_if_interrupted()
        partial.replace(real)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _refusal(target, error) from None
    finally:
        if partial is not None:
            with suppress(OSError):
                partial.unlink()


def check_place(path: str | os.PathLike[str]) -> None:
    """Check that a path can be written to, before a command works for minutes.

    Raises:
        InputError: the path is a folder, or lies in none.
    """
    try:
        _place(Path(path))
    except (OSError, ValueError) as error:
        raise _refusal(Path(path), error) from None


def _place(target: Path) -> Path:
    """Return the path of the file, with links resolved."""
    real = target.resolve()
    if real.is_dir():
        raise IsADirectoryError(0, "it is a folder")
    if not real.parent.is_dir():
        missing = real.parent if target.parent.is_dir() else target.parent  # behind a link, or as it was given
        raise FileNotFoundError(0, f"there is no folder {str(missing)!r}")
    return real


def _refusal(target: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"cannot write {os.fspath(target)!r}: {reason}; choose a file in a folder that takes new files")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 beside `path` first, and move it there when it is whole; an existing file is replaced.

    Raises:
        InputError: the file cannot be written; what was at `path` is as it was.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp(), "note.txt")
        >>> write_text(target, "whole")
        >>> target.read_text(), [p.name for p in target.parent.iterdir()]
        ('whole', ['note.txt'])
    """
    with replacing(path) as partial, open(partial, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)
