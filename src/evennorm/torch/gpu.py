"""Give the GPU kernels access to torch tensors. Triton is loaded by the first tensor on a GPU."""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evennorm.kernels import choose, triton
from evennorm.kernels.contract import ArrayAccess, UnfitError
from evennorm.torch.refusal import refused
from evennorm.torch.tensors import NAMES, PLAIN, acc_dtype

if TYPE_CHECKING:
    from evennorm.kernels.triton.kernel import TritonKernel


SUPPORTED = frozenset(
    getattr(torch, name) for name in triton.DTYPES if choose("torch", name, device="cuda", compiled=True) == "triton"
)
"""Dtypes that have kernels. Without Triton, their users get a warning."""

DEVICE = "cuda"
"""The type of the devices that are supported; tests in Triton's interpreter name another."""


def kernel_for(x: Tensor) -> TritonKernel | None:
    """Return the kernels for a tensor on a GPU; None where its dtype has none, Triton is missing, or one of them failed.

    The last two are told once, as a warning (`refusal`).
    """
    if x.device.type != DEVICE or x.dtype not in SUPPORTED or refused(x.dtype):
        return None
    return triton_kernel()


@cache
def triton_kernel() -> TritonKernel:
    """Return the kernels for tensors on any GPU, loading Triton."""
    from evennorm.kernels.triton.kernel import GpuAccess, TritonKernel

    access = ArrayAccess(
        address=Tensor.data_ptr,
        strides=Tensor.stride,
        sizes=lambda x: tuple(x.shape),
        item_bytes=Tensor.element_size,
        empty_like=torch.empty_like,
        empty_contiguous=lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
        empty=lambda shape, x: x.new_empty(shape, dtype=acc_dtype(x)),
        empty_bytes=lambda size, x: x.new_empty(size, dtype=torch.uint8),
        copy_like=lambda x, y: torch.empty_like(y).copy_(x),
    )
    real = hasattr(torch._C, "_cuda_getCurrentRawStream") and not triton.interpreted()
    gpu = GpuAccess(
        device=Tensor.get_device,
        dtype=_dtype,
        row=_row,
        fits=_fits,
        processors=_processors,
        stream=torch._C._cuda_getCurrentRawStream if real else lambda device: 0,
        current_device=torch._C._cuda_getDevice if real else lambda: -1,
        on_device=torch.cuda.device,
        is_recording=torch.cuda.is_current_stream_capturing if real else lambda: False,
        is_deterministic=torch.are_deterministic_algorithms_enabled,
        clear=Tensor.zero_,
        empty_flag=lambda x: x.new_empty((), dtype=torch.bool),
    )
    return TritonKernel(access, gpu)


_NAMES = {**NAMES, torch.int64: "int64"}
_dtype = attrgetter("dtype")


def _row(tensor: Tensor) -> Any:
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided:
        raise UnfitError(f"tensors in memory are read; received {type(tensor).__name__} of layout {tensor.layout}")
    return tensor.dtype, tensor.numel(), tensor.get_device(), tensor.is_contiguous(), tensor.is_neg()


def _fits(row: Any, dtypes: tuple[str, ...], size: int, device: int) -> bool:
    return _NAMES.get(row[0]) in dtypes and row[1:] == (size, device, True, False)


@cache
def _processors(device: int) -> int:
    """Return the number of multiprocessors of a GPU; two in the interpreter, which runs all programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 2
