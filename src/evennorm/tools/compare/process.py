"""Identify this process by a random token, and tell by another one's token whether its process is gone.

Host names and process numbers do not tell: containers share both. A token names a file in the folder for temporary files,
which its process keeps locked; the system unlocks it when the process ends, however that happens.
"""

from __future__ import annotations

import atexit
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows only heartbeats tell
    fcntl = None  # type: ignore[assignment]

_held: dict[int, tuple[str, int]] = {}
"""Token and open file, by the number of this process: a forked child has another one."""


def token() -> str:
    """Return the token of this process.

    Example:
        >>> token() == token(), is_gone(token())
        (True, False)
    """
    pid = os.getpid()
    if pid not in _held:
        name = secrets.token_hex(16)
        _held[pid] = name, _hold(_file(name))
        atexit.register(_release, pid)
    return _held[pid][0]


def is_gone(token: str) -> bool:
    """Return whether the process of a token has ended on this machine; False where that cannot be known, as on another
    machine."""
    if fcntl is None or not token.isalnum():
        return False
    path = _file(token)
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:  # not on this machine, or not our file
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:  # its process holds it
        return False
    finally:
        os.close(file)
    return True


def _file(token: str) -> Path:
    return Path(tempfile.gettempdir(), f"evennorm-{token}.lock")


def _hold(path: Path) -> int:
    """Lock a new file whose name nobody else knows; return -1 where that is not possible."""
    with suppress(OSError):
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    return -1


def _release(pid: int) -> None:
    if pid == os.getpid() and pid in _held:
        name, file = _held.pop(pid)
        with suppress(OSError):
            _file(name).unlink(missing_ok=True)
            os.close(file)
