"""Remember Ctrl-C, so that no library swallows it and no framework is interrupted while it computes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as in shells."""

LINE = "evennorm: interrupted"

_asked = threading.Event()
_waiting = 0
"""How many calls of `between_batches` are open."""


@contextmanager
def remembered() -> Iterator[None]:
    """Remember Ctrl-C while the body runs: it raises KeyboardInterrupt at once, and at every later `stop_if_interrupted`.

    An interrupt that arrives in a callback of a framework written in C++, or in a destructor, is printed there and forgotten
    otherwise. In a thread other than the main one, which gets no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
    before, printed = signal.signal(signal.SIGINT, _interrupt), sys.unraisablehook

    def print_unraisable(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            printed(lost)

    sys.unraisablehook = print_unraisable
    try:
        yield
    finally:
        sys.unraisablehook = printed
        signal.signal(signal.SIGINT, before)
        _asked.clear()


@contextmanager
def between_batches() -> Iterator[None]:
    """Let Ctrl-C wait for the next `stop_if_interrupted`, or for the end of the body, while a framework computes.

    A framework whose threads compute does not survive an exception at any place. A second Ctrl-C ends the process at once.
    """
    global _waiting
    stop_if_interrupted()
    _waiting += 1
    try:
        yield
        stop_if_interrupted()
    finally:
        _waiting -= 1


def interrupted() -> bool:
    """Return whether Ctrl-C was pressed since `remembered` began."""
    return _asked.is_set()


def stop_if_interrupted() -> None:
    """Raise KeyboardInterrupt after Ctrl-C.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    if _asked.is_set() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    again = _asked.is_set()
    _asked.set()
    if not _waiting:
        raise KeyboardInterrupt
    if again:
        os.write(2, f"{LINE}\n".encode())
        os._exit(INTERRUPTED)
