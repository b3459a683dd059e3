"""Update the running statistics of a module by its batches.

Kernels do so in their forward pass. Where none computes, tensor arithmetic does, by the formulas of `core.running`. Nothing
here waits for a device or reads a tensor's value, so that the same lines work under compilers, exporters and CUDA graphs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evennorm.core import running
from evennorm.core.moments import Moments
from evennorm.kernels.contract import RunningStats
from evennorm.torch.backend import engine
from evennorm.torch.errors import TensorError
from evennorm.torch.namespace import xp

if TYPE_CHECKING:
    from evennorm.torch.modules import _BatchNorm


def for_kernel(module: _BatchNorm, mean: Tensor | None, variance: Tensor | None) -> RunningStats:
    """Return the running statistics of a module in the form that kernels update."""
    if mean is not None:
        _fit_bookkeeping(module, mean)
    momentum, buffers = module.momentum, module._buffers
    batches = buffers.get("num_batches_tracked")
    decay = None if momentum is None else 1.0 - momentum
    if batches is None and momentum is None:
        decay = 1.0  # without a count nothing is updated, as in torch
    low, skipped = buffers.get("running_mean_low"), buffers.get("skipped_batches")
    return mean, low, variance, decay, True, batches, skipped


def _fit_bookkeeping(module: _BatchNorm, mean: Tensor) -> None:
    """Make new bookkeeping where a program has assigned statistics of another shape or on another device."""
    low, refused = module.running_mean_low, module.skipped_batches
    if (
        low is None
        or refused is None
        or low.shape != mean.shape
        or low.device != mean.device
        or refused.device != mean.device
    ):
        module._register_bookkeeping()


def update(module: _BatchNorm, mean: Tensor | None, variance: Tensor | None, moments: Moments) -> None:
    """Update `mean` and `variance`, the running ones if there are any, by one batch, and count it."""
    accepted: Any = True
    if mean is not None and variance is not None:
        _fit_bookkeeping(module, mean)
        low, momentum = module.running_mean_low, module.momentum
        accepted = None
        if momentum is not None:
            accepted = engine.update_running_stats((mean, low, variance), moments, 1.0 - momentum, True)
        if accepted is None:
            decay = _cumulative_decay(module, moments.mean.dtype) if momentum is None else 1.0 - momentum
            accepted = _assign(mean, low, variance, moments, decay)
        if isinstance(accepted, Tensor):
            module.skipped_batches.add_(~accepted)
        elif not accepted:
            module.skipped_batches.add_(1)
    batches = module.num_batches_tracked
    if batches is not None:
        batches.add_(1 if module.momentum is not None else accepted)


def _cumulative_decay(module: _BatchNorm, dtype: torch.dtype) -> Any:
    """Return the decay that gives all accepted batches the same weight; without a count nothing is updated, as in torch."""
    if module.num_batches_tracked is None:
        return 1.0
    return running.cumulative_decay(xp, module.num_batches_tracked.to(dtype))


def _assign(mean: Tensor, low: Tensor, variance: Tensor, moments: Moments, decay: Any) -> Tensor:
    """Update by tensor arithmetic; return whether the batch was accepted, as a tensor."""
    if mean.device != moments.mean.device:
        raise TensorError(
            f"running statistics are on the device of the input: {moments.mean.device}; received a module on {mean.device}; "
            "move one of them, by input.to or module.to"
        )
    moments = Moments(moments.count, *(statistic.detach() for statistic in moments[1:]))
    batch = running.summary(xp, moments, unbiased=True)
    dtype = batch.mean.dtype
    new = running.updated_mean(xp, running.RunningMean(mean.to(dtype), low.to(dtype)), batch, decay)
    new_variance = running.updated(xp, variance.to(dtype), batch.variance, decay, batch.has_variance)
    mean.copy_(new.mean)
    low.copy_(new.low)
    variance.copy_(new_variance)
    return batch.accepted
