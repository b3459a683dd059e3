"""Tensors on a GPU go in as they lie; dense ones, and the kernels called on their device, come out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from evennorm.core.geometry import Geometry
from evennorm.kernels.triton.layout import dense_view
from evennorm.torch.cpu import wide


@cache
def kernels() -> Any:
    """`evennorm.kernels.triton.launch`, which loads Triton."""
    from evennorm.kernels.triton import launch

    return launch


@cache
def memory() -> Any:
    return kernels().Memory(
        sizes=lambda x: tuple(x.shape),
        strides=Tensor.stride,
        item_bytes=Tensor.element_size,
        dtype=lambda x: x.dtype,
        device=lambda x: x.device.index,
        processors=lambda x: processors(x.device),
        timing=timing,
        empty_like=torch.empty_like,
        empty=lambda shape, x: torch.empty(shape, dtype=wide(x), device=x.device),
        empty_bytes=lambda size, x: torch.empty(size, dtype=torch.uint8, device=x.device),
        empty_doubles=lambda size, x: torch.empty(size, dtype=torch.float64, device=x.device),
        cleared=Tensor.zero_,
        copy_like=lambda array, x: torch.empty_like(x).copy_(array),
    )


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; two in the interpreter, which runs all programs one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def timing(x: Tensor) -> str:
    """Whether kernels may be run to see which choice is fastest: "now", or they were "before", or "never".

    Not while a CUDA graph is recorded. Under `torch.use_deterministic_algorithms` never: another choice adds in another
    order, which may show in the last bit.
    """
    if not x.is_cuda or torch.are_deterministic_algorithms_enabled():
        return "never"
    return "before" if torch.cuda.is_current_stream_capturing() else "now"


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else nullcontext()


def dense(x: Tensor, geometry: Geometry, group_size: int | None) -> Tensor:
    """`x`, copied where it has gaps in memory, or its axes lie so that no view describes them."""
    if dense_view(geometry, tuple(x.shape), x.stride(), group_size) is not None:
        return x
    copy = x.clone(memory_format=torch.preserve_format)  # without gaps, its axes in their order
    if dense_view(geometry, tuple(x.shape), copy.stride(), group_size) is not None:
        return copy
    return x.contiguous()


def forward(geometry: Geometry, x: Tensor, *given: Any) -> tuple[Tensor, Any]:
    """`launch.forward` of a dense tensor."""
    with on_device_of(x):
        return kernels().forward(memory(), geometry, x, *given)


def backward(geometry: Geometry, dy: Tensor, x: Tensor, *given: Any) -> Any:
    """`launch.backward` of a dense tensor."""
    with on_device_of(x):
        return kernels().backward(memory(), geometry, dy, x, *given)


def inference(geometry: Geometry, x: Tensor, *given: Any) -> Tensor:
    """`launch.inference` of a dense tensor."""
    with on_device_of(x):
        return kernels().inference(memory(), geometry, x, *given)
