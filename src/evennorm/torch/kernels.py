"""Choose the kernel that computes on given tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from evennorm.kernels import choose, cpu
from evennorm.kernels.contract import ArrayAccess, Kernel
from evennorm.kernels.parts import warn_once
from evennorm.torch import gpu
from evennorm.torch.tensors import NAMES, acc_dtype, plain, untransformed

ON_CPU = frozenset(dtype for dtype, name in NAMES.items() if choose("torch", name) == "cpu")


def _readable() -> bool:
    """Return whether the compiled kernels read tensors by torch's own table of C functions, which it has since 2.10."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return cpu.AVAILABLE and table is not None and cpu._cpu.enable_exchange(table, [Tensor, torch.nn.Parameter])


cpu_kernel = cpu.CpuKernel(
    ArrayAccess(
        address=None if _readable() else Tensor.data_ptr,
        strides=Tensor.stride,
        sizes=lambda x: tuple(x.shape),
        item_bytes=Tensor.element_size,
        empty_like=torch.empty_like,
        empty_contiguous=lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
        empty=lambda shape, x: torch.empty(shape, dtype=acc_dtype(x)),
        empty_bytes=lambda size, x: torch.empty(size, dtype=torch.uint8),
        copy_like=lambda x, y: torch.empty_like(y).copy_(x),
        from_dlpack=torch.from_dlpack,
    )
)


def kernel_for(x: Tensor, *others: Tensor | None) -> Kernel | None:
    """Return the kernel of x's device, if it can read all tensors as they are and no transform is active.

    Compilers do not call this: they see `evennorm.torch.compiled`.
    """
    kernel: Kernel | None = (cpu_kernel if x.dtype in ON_CPU else None) if x.is_cpu else gpu.kernel_for(x)
    if kernel is None or not (plain(x) and untransformed()):
        if x.is_cpu:
            warn_once("torch")
        return None
    device = x.device
    for tensor in others:
        if tensor is not None and not (plain(tensor) and tensor.device == device):
            return None
    return kernel
