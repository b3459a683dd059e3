"""Tell whether the GPU kernels, written in Triton, can be used. The first tensor that needs Triton loads it.

`tiling` divides an array into tiles, and `launch` runs the kernels; native/batch_norm.h says what they compute.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

DTYPES = ("float32", "float64", "bfloat16", "float16")

__all__ = ["AVAILABLE", "DTYPES", "interpreted", "missing"]


def missing() -> str | None:
    """Return why Triton cannot be loaded, as half a sentence with what to do; None if it can.

    TensorFlow and Triton each bring an LLVM. Triton after TensorFlow ends the process ("inconsistency in registered
    CommandLine options", Triton 3.9 with TensorFlow 2.21); the other order works.
    """
    if not _installed():
        return "Triton is not installed; pip install 'evennorm[gpu]'"
    if "tensorflow" in sys.modules and "triton" not in sys.modules:
        return "Triton cannot be loaded after TensorFlow; import triton before tensorflow"
    return None


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on tensors in CPU memory, which is decided when Triton is
    imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _installed() -> bool:
    if "triton" in sys.modules:
        return sys.modules["triton"] is not None
    return find_spec("triton") is not None


AVAILABLE = _installed()
"""Whether Triton is installed."""
