"""Find the library of TensorFlow operations with the compiled CPU kernels, and keep its settings.

TensorFlow loads it (`evennorm.tensorflow.compiled`); the operations are described in native/bind_tensorflow.cc.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec

from evennorm.kernels import parts

_found = find_spec("evennorm.kernels._tensorflow")  # no Python module, but found like one, also where evennorm is editable
PATH = "" if _found is None or _found.origin is None else _found.origin
AVAILABLE = bool(PATH)
"""Whether the library was built; without it the reference kernel computes."""

if not AVAILABLE:
    parts.keep("_tensorflow", ImportError())

_library: ctypes.CDLL | None = None
_asked: dict[str, int] = {}


def loaded() -> None:
    """Pass the settings made so far to the library. Called once TensorFlow has loaded it."""
    global _library
    _library = ctypes.CDLL(PATH)
    _library.evennorm_set_buffer_limit.argtypes = [ctypes.c_size_t]
    for name, value in _asked.items():
        getattr(_library, name)(value)


def set_num_threads(threads: int) -> None:
    """Set how many threads share one operation; 0 for the initial setting."""
    _tell("evennorm_set_num_threads", threads)


def set_buffer_limit(size: int) -> None:
    """Set how many bytes of dead tensors are kept for the next ones."""
    _tell("evennorm_set_buffer_limit", size)


def _tell(name: str, value: int) -> None:
    _asked[name] = value
    if _library is not None:
        getattr(_library, name)(value)
