"""Differentiate what kernels compute, by one autograd.Function for every device."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from evennorm.core.activation import LINEAR, gated_by
from evennorm.core.call import Call
from evennorm.core.moments import Moments
from evennorm.core.moments import moments as moments_of
from evennorm.kernels import reference
from evennorm.kernels.contract import Gradients, Kernel, RunningStats, Saved, UnfitError
from evennorm.torch.namespace import xp
from evennorm.torch.refusal import refuse_after
from evennorm.torch.tensors import plain


class _BatchNorm(torch.autograd.Function):
    """Normalization by a kernel. It saves x, the statistics, and one bit per element where an activation follows a
    residual."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        given: tuple[Kernel, Call, RunningStats | None, Tensor | None, bool],
    ) -> Any:
        kernel, call, running, statistics, returns_moments = given
        y, saved = kernel.forward(call, x, gamma, beta, residual, running=running, statistics=statistics)
        statistics, mask = saved
        ctx.save_for_backward(x, gamma, beta, statistics, mask)
        ctx.given = kernel, call, residual is not None
        if not returns_moments:
            return y
        mean, mean_low, variance = statistics.unbind()
        # The mean is a constant: mean_low carries the derivative of both.
        ctx.mark_non_differentiable(mean)
        ctx.set_materialize_grads(False)
        return y, mean, mean_low, variance

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, _: Any = None, d_mean: Tensor | None = None, d_variance: Tensor | None = None
    ) -> tuple[Any, ...]:
        x, gamma, beta, statistics, mask = ctx.saved_tensors
        kernel, call, has_residual = ctx.given
        dy = torch.zeros_like(x) if dy is None else dy
        return *gradients(kernel, call, dy, x, gamma, beta, (statistics, mask), has_residual, d_mean, d_variance), None


# Skip the wrapper that looks for functorch's transforms, as `kernel_for` did: a third of the time on small arrays.
batch_norm = super(torch.autograd.Function, _BatchNorm).apply


def gradients(
    kernel: Kernel,
    call: Call,
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    saved: Saved,
    has_residual: bool,
    d_mean: Tensor | None = None,
    d_variance: Tensor | None = None,
) -> Gradients:
    """Compute the gradients of x, gamma, beta and residual by the kernel.

    Where they are to be differentiated or vectorized, operations compute that autograd takes again.
    """
    if dy.dtype is not x.dtype:
        dy = dy.to(x.dtype)
    if d_mean is not None:
        d_mean = d_mean.contiguous()
    if d_variance is not None:
        d_variance = d_variance.contiguous()
    # A gradient penalty differentiates this again; torch.func.vmap vectorizes it.
    by_kernel = plain(dy) and not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    if by_kernel and not call.gradient_needs_formulas:
        try:
            return kernel.backward(call, dy, x, gamma, beta, saved, has_residual, d_mean, d_variance)
        except UnfitError:  # dy has no memory of its own under the older vmap
            pass
        except Exception as error:
            refuse_after(kernel, error, x.dtype)
    statistics, mask = saved
    if mask is not None:
        with torch.no_grad():
            is_open = kernel.open_elements(call, x, gamma, beta, saved)
        dy, call = gated_by(xp, dy, ~is_open, call.activation), replace(call, activation=LINEAR)
    dx, d_gamma, d_beta, _ = composed_gradients(call, dy, x, gamma, beta, statistics, d_mean, d_variance)
    return dx, d_gamma, d_beta, dy if has_residual else None


def composed_gradients(
    call: Call,
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    statistics: Tensor | None = None,
    d_mean: Tensor | None = None,
    d_variance: Tensor | None = None,
) -> Gradients:
    """Compute the gradients of x, gamma and beta by tensor operations, including those through the moments where x acts on
    them."""
    geometry = call.geometry
    dy_view, x_view = (geometry.view(xp, tensor, call.group_size) for tensor in (dy, x))
    if call.fixed_stats:
        assert statistics is not None, "fixed statistics are given"
        moments = Moments(inf, *statistics)  # as of infinitely many values: x moves no mean
    else:
        moments = moments_of(xp, reference.wide(xp, x_view))
    d_mean, d_variance = (None if d is None else d.reshape(moments.mean.shape) for d in (d_mean, d_variance))
    g = reference.backward(xp, call, dy_view, x_view, moments, gamma, beta, None, None, d_mean, d_variance)
    return geometry.restore(xp, g.x, tuple(x.shape)), g.gamma, g.beta, None
