"""The compiled CPU kernels (native/bind_xla.cc) as handlers of XLA's foreign function interface."""

from typing import Any

BUNDLED_PLANE: int  # elements; see kBundledPlane in native/batch_norm.h

def registrations() -> dict[str, Any]: ...  # capsules, by the name of the target
def allocator() -> tuple[str, bool]: ...  # its name, and whether keep_memory can set it
def keep_memory(keep: bool) -> bool: ...
def arenas() -> int: ...  # heaps that threads of this process have taken memory from
def set_num_threads(threads: int) -> None: ...  # 0: as many as XLA's pool has
