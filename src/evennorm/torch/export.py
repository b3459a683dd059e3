"""Write a module's call in torch's own operations, for tools that know only those: exporters, TorchScript's tracer,
torch.fx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from evennorm.core.activation import Activation, activate, activation_of
from evennorm.torch.errors import UnsupportedError
from evennorm.torch.namespace import xp

if TYPE_CHECKING:
    from evennorm.torch.modules import _BatchNorm


def asked_for() -> bool:
    """Return whether a program is being recorded that has to run without evennorm."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._is_tracing()


def normalize(module: _BatchNorm, input: Tensor, residual: Tensor | None, given: Activation | None) -> Tensor:
    """Compute `module` at inference; arguments as in its call."""
    module._check_input_dim(input)
    y = F.batch_norm(input, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps)
    return _finished(module, y, residual, given)


def normalize_by_batch(module: _BatchNorm, input: Tensor, residual: Tensor | None, given: Activation | None) -> Tensor:
    """Compute `module` without running statistics, at inference: by arithmetic, since exporters keep no training op.

    Raises:
        UnsupportedError: a module in training mode, or one of ghost batches or in place.
    """
    if module.training:
        raise UnsupportedError(
            f"a program that is traced normalizes by running statistics; received {type(module).__name__} in training mode; "
            "call model.eval() first, and for torch.onnx.export leave training= out"
        )
    if module.virtual_batch_size is not None or module.memory != "save":
        raise UnsupportedError(
            "a program that is traced has no ghost batches and overwrites no input; received "
            f"virtual_batch_size={module.virtual_batch_size} and memory={module.memory!r}; make the module without"
        )
    module._check_input_dim(input)
    x = input if input.dtype is torch.float64 else input.float()
    reduced = [axis for axis in range(x.dim()) if axis != 1]
    centred = x - x.mean(reduced, keepdim=True)
    y = centred * torch.rsqrt((centred * centred).mean(reduced, keepdim=True) + module.eps)
    along = (1, -1, *[1] * (x.dim() - 2))
    y = y if module.weight is None else y * module.weight.to(x.dtype).reshape(along)
    y = y if module.bias is None else y + module.bias.to(x.dtype).reshape(along)
    return _finished(module, y.to(input.dtype), residual, given)


def _finished(module: _BatchNorm, y: Tensor, residual: Tensor | None, given: Activation | None) -> Tensor:
    """Apply what follows the normalization."""
    y = y if residual is None else y + residual
    if given is None and module.activation == "elu":
        return F.elu(y, module.alpha)
    return activate(xp, y, activation_of(module.activation, module.negative_slope) if given is None else given)


def one_node(module: _BatchNorm, input: Any, residual: Any, mask: Any) -> Any:
    """Record a call of the module in torch.fx as one node, as torch.fx does for torch.nn's."""
    args = (input,) if residual is None else (input, residual)
    path = input.tracer.path_of_module(module)
    return input.tracer.create_proxy("call_module", path, args, {} if mask is None else {"mask": mask})
