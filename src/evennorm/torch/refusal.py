"""Why torch operations serve tensors on a GPU in place of its kernels: each reason is told once, as a warning."""

from __future__ import annotations

import warnings

import torch

from evennorm.kernels import triton

_reasons: dict[torch.dtype | None, str] = {}
"""For tensors of a dtype, or None for all."""


def refused(dtype: torch.dtype) -> bool:
    """Whether Triton is missing, or one of its kernels failed for tensors of this dtype."""
    if None not in _reasons:
        missing = triton.missing()
        if missing is None:
            return dtype in _reasons
        _refuse(None, missing)
    return True


def refuse_after(error: Exception, dtype: torch.dtype) -> None:
    """Has the composed form serve a dtype from now on: a kernel could not be built or started.

    Raises:
        torch.OutOfMemoryError: that was the error; the composed form would need more still.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    text = " ".join(str(error).split())[:300]
    _refuse(dtype, f"a kernel failed with {type(error).__name__}: {text or 'no reason given'}")


def _refuse(dtype: torch.dtype | None, reason: str) -> None:
    if dtype in _reasons:
        return
    _reasons[dtype] = reason
    which = "tensors on a GPU" if dtype is None else f"{dtype} tensors on a GPU"
    message = f"evennorm takes several operations of torch in place of one fused kernel for {which}: {reason}"
    warnings.warn(message, stacklevel=2)
