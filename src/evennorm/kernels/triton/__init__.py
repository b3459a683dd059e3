"""The GPU kernels, in Triton: whether they can serve here. Triton itself is loaded by the first tensor that needs it.

`layout` says how an array is cut, `launch` runs the kernels; what they compute stands in native/batch_norm.h.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

DTYPES = ("float32", "float64", "bfloat16", "float16")

__all__ = ["AVAILABLE", "DTYPES", "interpreted", "missing"]


def missing() -> str | None:
    """Why Triton cannot be loaded, in half a sentence with what to do; None where it can.

    TensorFlow and Triton each bring an LLVM. Triton after TensorFlow ends the process ("inconsistency in registered
    CommandLine options", Triton 3.9 with TensorFlow 2.21); the other order works.
    """
    if not _installed():
        return "Triton is not installed; pip install 'evennorm[gpu]'"
    if "tensorflow" in sys.modules and "triton" not in sys.modules:
        return "Triton cannot be loaded after TensorFlow; import triton before tensorflow"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors in CPU memory. It decides when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _installed() -> bool:
    if "triton" in sys.modules:
        return sys.modules["triton"] is not None
    return find_spec("triton") is not None


AVAILABLE = _installed()
"""Whether Triton is installed."""
