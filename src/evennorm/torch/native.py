"""Pass the most common calls of modules and of `batch_norm` straight to the compiled kernels, without Python in between.

The extension that does so, native/bind_torch.cc, is linked to libtorch and named after its version: with another torch it is
not found, and calls go through Python. It knows no geometry: for a new shape it asks here. An unusual call it hands back.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evennorm.core.call import Call
from evennorm.errors import EvennormError
from evennorm.kernels import cpu, parts
from evennorm.torch import autograd
from evennorm.torch.kernels import ON_CPU, cpu_kernel

if TYPE_CHECKING:
    from evennorm.torch.modules import _BatchNorm

EXTENSION = "_torch_" + "_".join(torch.__version__.split("+")[0].split("."))
BUILD_BESIDE_TORCH = (
    "install torch 2.13, scikit-build-core, nanobind, cmake and ninja, then run pip install --no-build-isolation . in "
    "evennorm's source tree"
)


def _forward_plan(
    module: _BatchNorm, x: Tensor, residual: Tensor | None, slope: float | None, limit: float, by_batch: bool, masked: bool
) -> tuple[Any, ...] | None:
    """Describe a forward pass on x's layout; return None where Python computes, or raises an error."""
    mean, variance = module.running_mean, module.running_var
    if by_batch and not (module.training and module.track_running_stats):
        mean = variance = None
    try:
        call = module._call_of(module.__dict__, x, by_batch, module.weight, mean, variance, slope, limit)
        return _function_plan(call, x, residual, masked)
    except EvennormError:
        return None


def _function_plan(call: Call, x: Tensor, residual: Tensor | None, masked: bool) -> tuple[Any, ...] | None:
    """Describe a forward pass of a function likewise."""
    if x.dtype not in ON_CPU:
        return None
    found = cpu_kernel.forward_layout(call, x, residual, masked)
    return found and (*found, call)


def _backward_plan(call: Call, dy: Tensor, x: Tensor, masked: bool) -> tuple[Any, ...] | None:
    return None if call.gradient_needs_formulas else cpu_kernel.backward_layout(call, dy, x, masked)


def _gradients(
    call: Call,
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    statistics: Tensor,
    mask: Tensor | None,
    has_residual: bool,
    d_mean: Tensor | None,
    d_variance: Tensor | None,
) -> tuple[Tensor | None, ...]:
    saved = statistics, mask
    return autograd.gradients(cpu_kernel, call, dy, x, gamma, beta, saved, has_residual, d_mean, d_variance)


def _loaded() -> Any:
    if not cpu.AVAILABLE:
        return None
    try:
        extension = import_module(f"evennorm.kernels.{EXTENSION}")
    except ImportError as error:
        parts.keep(EXTENSION, error, BUILD_BESIDE_TORCH)
        return None
    extension.connect(cpu._cpu.exported, _forward_plan, _function_plan, _backward_plan, _gradients)
    torch.library.register_fake("evennorm_cpu::update_running_stats", lambda *_: None)
    return extension


extension = _loaded()
AVAILABLE = extension is not None
update_running_stats: Any = torch.ops.evennorm_cpu.update_running_stats.default if AVAILABLE else None
