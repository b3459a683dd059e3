"""`core`'s array namespace on torch tensors."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from evennorm.core.namespace import Namespace, Summation

WITHOUT_FLOAT64 = {"mps"}
"""Types of devices that have no float64; there float32 is the widest."""


class TorchNamespace:
    """Torch's functions under NumPy's names."""

    float32 = torch.float32
    float64 = torch.float64
    widest = torch.float64
    summation: Summation = "tree"
    broadcast_to = staticmethod(torch.broadcast_to)
    concatenate = staticmethod(torch.cat)
    where = staticmethod(torch.where)
    sqrt = staticmethod(torch.sqrt)
    isfinite = staticmethod(torch.isfinite)
    all = staticmethod(torch.all)
    any = staticmethod(torch.any)
    reshape = staticmethod(torch.reshape)

    @staticmethod
    def shape(x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape)

    @staticmethod
    def dtype(x: Tensor) -> torch.dtype:
        return x.dtype

    @staticmethod
    def astype(x: Tensor, dtype: torch.dtype) -> Tensor:
        # torch.export passes unknown sizes as symbolic integers.
        if isinstance(x, Tensor):
            if dtype is torch.float64 and x.device.type in WITHOUT_FLOAT64:
                dtype = torch.float32
            return x if x.dtype is dtype else x.to(dtype)  # exporters also record a cast that changes nothing
        return torch.scalar_tensor(x, dtype=dtype)

    @staticmethod
    def asarray(value: Any, like: Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(like)
        # Filled on the device: copying a number there would make the program wait.
        return torch.full((), value, dtype=like.dtype, device=like.device)

    @staticmethod
    def transpose(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return torch.permute(x, axes)

    @staticmethod
    def boolean(x: Any) -> Tensor:
        return torch.as_tensor(x).to(torch.bool)

    @staticmethod
    def sum(x: Tensor, axis: tuple[int, ...]) -> Tensor:
        return torch.sum(x, dim=axis)

    @staticmethod
    def maximum(a: Tensor, b: Any) -> Tensor:
        return torch.maximum(a, b) if isinstance(b, Tensor) else torch.clamp(a, min=b)

    @staticmethod
    def minimum(a: Tensor, b: Any) -> Tensor:
        return torch.minimum(a, b) if isinstance(b, Tensor) else torch.clamp(a, max=b)

    @staticmethod
    def leaky_relu(x: Tensor, slope: float) -> Tensor:
        return torch.relu(x) if slope == 0 else torch.nn.functional.leaky_relu(x, slope)

    relu6 = staticmethod(torch.nn.functional.relu6)

    @staticmethod
    def stop_gradient(x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        bits = x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)
        return (bits & -2).view(x.dtype)


xp = cast(Namespace, TorchNamespace())
