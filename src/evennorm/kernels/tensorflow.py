"""The compiled CPU kernels as operations of TensorFlow: where their library lies, and what it is told beside tensors.

TensorFlow loads it (`evennorm.tensorflow.compiled`); the operations are described in native/bind_tensorflow.cc.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec

from evennorm.kernels import parts

_found = find_spec("evennorm.kernels._tensorflow")  # no module, but lies where those are, in an editable installation too
PATH = "" if _found is None or _found.origin is None else _found.origin
AVAILABLE = bool(PATH)
"""False where it was not built: the reference kernel serves."""

if not AVAILABLE:
    parts.keep("_tensorflow", ImportError())

_library: ctypes.CDLL | None = None
_asked: dict[str, int] = {}


def loaded() -> None:
    """To be called once TensorFlow has loaded the library, which from now on is told what it missed."""
    global _library
    _library = ctypes.CDLL(PATH)
    _library.evennorm_set_buffer_limit.argtypes = [ctypes.c_size_t]
    for name, value in _asked.items():
        getattr(_library, name)(value)


def set_num_threads(threads: int) -> None:
    """How many threads share one operation; 0 for the initial setting."""
    _tell("evennorm_set_num_threads", threads)


def set_buffer_limit(size: int) -> None:
    """How many bytes of dead tensors are kept for the next ones."""
    _tell("evennorm_set_buffer_limit", size)


def _tell(name: str, value: int) -> None:
    _asked[name] = value
    if _library is not None:
        getattr(_library, name)(value)
