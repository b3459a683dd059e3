"""A module's call in torch's own words, for tools that know those alone: exporters, TorchScript's tracer, torch.fx."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

if TYPE_CHECKING:
    from evennorm.torch.modules import _BatchNorm


def asked_for() -> bool:
    """Whether a program is being written down that is to run without evennorm."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._is_tracing()


def normalize(module: _BatchNorm, input: Tensor, residual: Tensor | None, slope: float | None) -> Tensor:
    """`module` at inference; arguments as in its call."""
    module._check_input_dim(input)
    y = F.batch_norm(input, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps)
    y = y if residual is None else y + residual
    if slope is not None:
        return F.leaky_relu(y, slope) if slope else F.relu(y)
    match module.activation:
        case "relu":
            return F.relu(y)
        case "leaky_relu":
            return F.leaky_relu(y, module.negative_slope)
        case "elu":
            return F.elu(y, module.alpha)
    return y


def one_node(module: _BatchNorm, input: Any, residual: Any, mask: Any) -> Any:
    """A call of the module as torch.fx records those of torch.nn's, without looking into it."""
    args = (input,) if residual is None else (input, residual)
    path = input.tracer.path_of_module(module)
    return input.tracer.create_proxy("call_module", path, args, {} if mask is None else {"mask": mask})
