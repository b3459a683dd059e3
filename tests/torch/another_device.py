"""A device `far` on the processor: like Apple's, it has no float64 and no kernels of evennorm, and cannot read other memory.

Importing it registers the device for the whole process, so only programs that tests start do so.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("far")

FAR = torch.device("far:0")
_COPIES = ("aten._to_copy.default", "aten.copy_.default")


class _Far(Tensor):
    """A tensor whose values lie in one of the processor's, `near`."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> "_Far":
        if near.dtype is torch.float64:
            raise TypeError("the device far does not support float64")
        given = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype, "device": FAR}
        tensor = torch.Tensor._make_wrapper_subclass(cls, near.size(), **given)
        tensor.near = near
        return tensor

    def __init__(self, near: Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        settings = dict(kwargs or {})
        device = torch.device(settings.pop("device", None) or FAR)

        def near(x: Any) -> Any:
            if isinstance(x, _Far):
                return x.near
            if isinstance(x, Tensor) and x.dim() > 0 and str(function) not in _COPIES:
                raise RuntimeError(f"{function}: expected all tensors on one device; found far and {x.device}")
            return x

        given, settings = pytree.tree_map(near, (args, settings))
        result = function(*given, **settings)
        if device.type != "far":
            return result
        if isinstance(result, Tensor) and function._schema.is_mutable and result is given[0]:
            return args[0]
        return pytree.tree_map(lambda y: _Far(y) if isinstance(y, Tensor) else y, result)


def _moved(x: Tensor, *, dtype: Any = None, device: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    near = x.near if isinstance(x, _Far) else x
    moved = torch.ops.aten._to_copy.default(near, dtype=dtype, memory_format=memory_format)
    return _Far(moved) if device is None or torch.device(device).type == "far" else moved


_library = torch.library.Library("aten", "IMPL")
_library.impl("_to_copy", _moved, "PrivateUse1")
_library.impl(
    "empty.memory_format",
    lambda size, *, dtype=None, memory_format=None, **_: _Far(torch.empty(size, dtype=dtype, memory_format=memory_format)),
    "PrivateUse1",
)
_library.impl(
    "empty_strided",
    lambda size, stride, *, dtype=None, **_: _Far(torch.empty_strided(size, stride, dtype=dtype)),
    "PrivateUse1",
)
