"""Limit how much used memory the compiled CPU kernels keep for their next outputs."""

from __future__ import annotations

from evennorm.errors import ArgumentError
from evennorm.kernels import tensorflow
from evennorm.kernels.cpu import _cpu


def set_buffer_limit(megabytes: float) -> None:
    """Set how much memory of dead tensors and NumPy arrays is kept for the next ones, 256 MB at first.

    Only outputs and gradients that the compiled kernels wrote are kept, of 4 MB or more; what was unused longest is
    given back first. Memory in use is not counted. TensorFlow's tensors have such a limit for themselves; JAX has memory of
    its own.

    Args:
        megabytes: 0 or more; 0 gives everything back to the system at once, and keeps nothing.

    Raises:
        ArgumentError: a negative amount.

    Example:
        >>> import evennorm
        >>> evennorm.set_buffer_limit(64)
        >>> evennorm.set_buffer_limit(256)
    """
    if not megabytes >= 0:
        raise ArgumentError(f"the limit is a number of megabytes, 0 or more; received {megabytes=}")
    if _cpu is not None:
        _cpu.set_buffer_limit(int(megabytes * 2**20))
    tensorflow.set_buffer_limit(int(megabytes * 2**20))
