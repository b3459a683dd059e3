"""The compiled CPU kernels as XLA calls them: handlers to register. Their arguments are described in native/bind_xla.cc."""

from __future__ import annotations

from typing import Any

from evennorm.kernels import parts

try:
    from evennorm.kernels import _xla
except ImportError as error:  # the reference kernel serves
    parts.keep("_xla", error)
    _xla = None  # type: ignore[assignment]

AVAILABLE = _xla is not None
"""False too once XLA has refused them."""

FORWARD, BACKWARD = "evennorm_forward", "evennorm_backward"

# The places of the arrays that follow x in each call.
FORWARD_GIVEN = ("gamma", "beta", "residual")
FORWARD_WANTED = ("y", "mean", "mean_low", "variance", "signs")
BACKWARD_GIVEN = ("gamma", "beta", "mean", "mean_low", "variance", "signs", "d_y", "d_mean_low", "d_variance")
BACKWARD_WANTED = ("x", "gamma", "beta", "residual")


def registrations() -> dict[str, Any]:
    """The handlers by the names of their targets."""
    return {} if _xla is None else _xla.registrations()


def refuse(why: str, remedy: str) -> None:
    """Have the reference kernel serve from now on, since XLA does not take the handlers."""
    global AVAILABLE
    AVAILABLE = False
    parts.keep("_xla", why, remedy)


def set_num_threads(threads: int) -> None:
    """Lets at most so many threads of XLA's pool share one operation; 0 for all of them. The results are the same bits."""
    if _xla is not None:
        _xla.set_num_threads(threads)


def allocator() -> tuple[str, bool]:
    """Whose malloc serves this process, and whether `keep_memory` can set it; nobody's where the kernels are not built."""
    return ("", False) if _xla is None else _xla.allocator()


def keep_memory(keep: bool) -> bool:
    """Have glibc keep what is freed, or give it back; False where it did not take the settings."""
    return False if _xla is None else bool(_xla.keep_memory(keep))


def arenas() -> int:
    """Return from how many of glibc's heaps the threads of this process have taken memory; 0 where that is not known."""
    return 0 if _xla is None else int(_xla.arenas())


def places(names: tuple[str, ...], order: tuple[str, ...]) -> int:
    """Which of the arrays in `order` are there, one bit each, as the handlers read it.

    Example:
        >>> bin(places(("gamma", "residual"), FORWARD_GIVEN))
        '0b101'
    """
    return sum(1 << order.index(name) for name in names)
