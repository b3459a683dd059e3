"""Make the C library keep the memory that XLA frees, so that results on the CPU are written to pages that exist already."""

from __future__ import annotations

from threading import Lock
from typing import NamedTuple

from evennorm.errors import ArgumentError
from evennorm.kernels import parts, xla

__all__ = ["KeptMemory", "keep_memory", "memory_kept"]


class KeptMemory(NamedTuple):
    """Whether freed memory is kept, by which allocator, and if nothing was done, why.

    `late` says that threads had taken memory before: their arrays above 64 MB still go back to the system.
    """

    kept: bool
    allocator: str
    problem: str | None = None
    late: bool = False

    def __str__(self) -> str:
        """Return the state as a sentence.

        Example:
            >>> print(KeptMemory(True, "glibc 2.36"))
            glibc 2.36 keeps the memory that this process frees
        """
        if self.problem is not None:
            return f"nothing was changed: {self.problem}"
        done = f"{self.allocator} {'keeps' if self.kept else 'gives back'} the memory that this process frees"
        if not self.late:
            return done
        return f"{done}, but for arrays above 64 MB of threads that ran before; call it before the first computation"


_lock = Lock()
_kept = False
_late = False


def keep_memory(keep: bool = True) -> KeptMemory:
    """Keep the memory that this process frees for its next allocations, or return it to the system.

    On the CPU, XLA takes the memory of results and of what lies between from malloc, and frees it after. glibc gives large
    pieces back to the system, and fills the pages of the next with zeros first, which takes longer than batch normalization.
    With memory kept, the whole process stays as large as it once was; docs/limits.md has the gain and the cost.

    Sets glibc's M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD and M_ARENA_MAX, for all threads and libraries of the process.
    Call it before the first computation: a thread that has taken memory before keeps its own heap, which cannot hold
    arrays above 64 MB. Where the C library or its malloc is another, or XLA's kernels are not built, it does nothing and
    says so. A second call changes nothing more.

    Args:
        keep: False gives back at once what is free, and from then on what is freed, as glibc does by itself, except that its
            threshold for large pieces stays at 128 kB, where it would grow, and that new threads go on sharing one heap.
            What MALLOC_* variables had set is not restored.

    Raises:
        ArgumentError: neither True nor False.

    Example:
        >>> from evennorm.jax import keep_memory, memory_kept
        >>> found = keep_memory()
        >>> found.kept or found.problem is not None
        True
        >>> found == keep_memory() == memory_kept()
        True
        >>> keep_memory(False).kept
        False
    """
    global _kept, _late
    if not isinstance(keep, bool):
        raise ArgumentError(f"keep is True or False; received {keep!r}; call keep_memory() to keep what is freed")
    with _lock:
        arenas = xla.arenas()
        if keep != _kept and xla.keep_memory(keep):
            _kept, _late = keep, keep and arenas > 1
        return memory_kept()


def memory_kept() -> KeptMemory:
    """Return what `keep_memory` has done to this process, and change nothing.

    Example:
        >>> memory_kept().kept
        False
    """
    return KeptMemory(_kept, xla.allocator()[0], _problem(), _late)


def _problem() -> str | None:
    allocator, settable = xla.allocator()
    if settable:
        return None
    missing = parts.problem("_xla")
    if missing is not None and not allocator:
        return f"{missing.why}; to mend it, {missing.remedy}"
    return f"keep_memory knows glibc's settings alone, and memory here comes from {allocator}"
