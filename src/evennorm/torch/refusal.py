"""Remember, and report once, why torch operations replace the kernels for tensors on a GPU."""

from __future__ import annotations

import warnings

import torch

from evennorm.errors import EvennormError
from evennorm.kernels import triton
from evennorm.kernels.contract import Kernel, UnfitError

_reasons: dict[torch.dtype | None, str] = {}
"""The reason, by dtype; None stands for all dtypes."""


def refused(dtype: torch.dtype) -> bool:
    """Return whether Triton is missing, or one of its kernels failed for tensors of this dtype."""
    if None not in _reasons:
        missing = triton.missing()
        if missing is None:
            return dtype in _reasons
        _refuse(None, missing)
    return True


def refuse_after(kernel: Kernel, error: Exception, dtype: torch.dtype) -> None:
    """Use the composed form for a dtype on GPUs from now on, since a kernel could not be built or started.

    Raises:
        Exception: `error`, where the composed form is no way out: memory ran short, arguments are wrong, or the kernel is
            compiled ahead of time.
    """
    if kernel.name != "triton" or isinstance(error, (torch.OutOfMemoryError, EvennormError)):
        raise error
    if isinstance(error, UnfitError):
        return
    text = " ".join(str(error).split())[:300]
    _refuse(dtype, f"a kernel failed with {type(error).__name__}: {text or 'no reason given'}")


def _refuse(dtype: torch.dtype | None, reason: str) -> None:
    if dtype in _reasons:
        return
    _reasons[dtype] = reason
    which = "tensors on a GPU" if dtype is None else f"{dtype} tensors on a GPU"
    message = f"evennorm takes several operations of torch in place of one fused kernel for {which}: {reason}"
    warnings.warn(message, stacklevel=2)
