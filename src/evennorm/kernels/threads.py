"""Set how many threads the compiled CPU kernels use."""

from __future__ import annotations

from evennorm.errors import ArgumentError
from evennorm.kernels import tensorflow
from evennorm.kernels.cpu import _cpu


def set_num_threads(threads: int) -> None:
    """Set how many threads the compiled CPU kernels use.

    Args:
        threads: 1 or more; 0 for the initial setting: the framework's, `torch.set_num_threads`, where torch is loaded, else
            the cores that this process may use. The environment variable EVENNORM_NUM_THREADS gives another initial one.

    XLA's kernels run on XLA's own threads and do not ask. No result depends on the number.

    Raises:
        ArgumentError: not a number of threads.

    Example:
        >>> import evennorm
        >>> evennorm.set_num_threads(2)
        >>> evennorm.num_threads()
        2
        >>> evennorm.set_num_threads(0)
    """
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 0:
        raise ArgumentError(f"threads is a whole number, 0 or more, 0 for the framework's setting; received {threads=}")
    if _cpu is not None:
        _cpu.set_num_threads(threads)
    tensorflow.set_num_threads(threads)


def num_threads() -> int:
    """Return how many threads the compiled CPU kernels use now; 1 where they were not built."""
    return 1 if _cpu is None else _cpu.num_threads()
