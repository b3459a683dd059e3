"""Provide the compiled CPU kernels as handlers for XLA. Their arguments are described in native/bind_xla.cc."""

from __future__ import annotations

from typing import Any

from evennorm.kernels import parts

try:
    from evennorm.kernels import _xla
except ImportError as error:  # the reference kernel computes instead
    parts.keep("_xla", error)
    _xla = None  # type: ignore[assignment]

AVAILABLE = _xla is not None
"""Whether the handlers were built. False, too, once XLA has refused them."""

BUNDLED_PLANE: int = 0 if _xla is None else _xla.BUNDLED_PLANE
"""Elements of a channel, next to each other, up to which the bits of an activation mask are packed without a gap."""

FORWARD, BACKWARD = "evennorm_forward", "evennorm_backward"

# The positions of the arrays that follow x in each call.
FORWARD_GIVEN = ("gamma", "beta", "residual")
FORWARD_WANTED = ("y", "mean", "mean_low", "variance", "relu_mask")
BACKWARD_GIVEN = ("gamma", "beta", "mean", "mean_low", "variance", "relu_mask", "d_y", "d_mean_low", "d_variance")
BACKWARD_WANTED = ("x", "gamma", "beta", "residual")


def registrations() -> dict[str, Any]:
    """Return the handlers by the names of their targets."""
    return {} if _xla is None else _xla.registrations()


def refuse(why: str, remedy: str) -> None:
    """Use the reference kernel from now on, since XLA does not take the handlers."""
    global AVAILABLE
    AVAILABLE = False
    parts.keep("_xla", why, remedy)


def set_num_threads(threads: int) -> None:
    """Let at most this many threads of XLA's pool share one operation; 0 for all of them. The results are the same bits."""
    if _xla is not None:
        _xla.set_num_threads(threads)


def allocator() -> tuple[str, bool]:
    """Return whose malloc this process uses, and whether `keep_memory` can set it; nobody's where the kernels are not
    built."""
    return ("", False) if _xla is None else _xla.allocator()


def keep_memory(keep: bool) -> bool:
    """Make glibc keep freed memory, or return it to the system; return False where it refused the settings."""
    return False if _xla is None else bool(_xla.keep_memory(keep))


def arenas() -> int:
    """Return from how many of glibc's heaps the threads of this process have taken memory; 0 where that is not known."""
    return 0 if _xla is None else int(_xla.arenas())


def places(names: tuple[str, ...], order: tuple[str, ...]) -> int:
    """Return which of the arrays in `order` are present, one bit each, as the handlers read it.

    Example:
        >>> bin(places(("gamma", "residual"), FORWARD_GIVEN))
        '0b101'
    """
    return sum(1 << order.index(name) for name in names)
