"""Say which tensors kernels can read, and convert parameters to the precision that they compute in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

NAMES = {getattr(torch, name): name for name in ("float32", "float64", "bfloat16", "float16")}
"""Names of the dtypes that kernels compute on."""

PLAIN = frozenset((Tensor, torch.nn.Parameter))


def acc_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that `x` is computed in: float64 for float64, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def plain(tensor: Tensor) -> bool:
    """Return whether a tensor is an array in memory: no subclass, no sparse layout, no values that are negated when read.

    `x.conj().imag` is negated when it is read: its memory holds the opposite of its values.
    """
    return type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_neg()


def untransformed() -> bool:
    """Return whether operations run as they are called: no transform vectorizes, traces, records or takes tangents of
    them."""
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def dense(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a parameter or statistic as a contiguous tensor of a dtype, differentiably."""
    if parameter is None or (parameter.dtype is dtype and parameter.is_contiguous()):
        return parameter
    return parameter.to(dtype).contiguous()
