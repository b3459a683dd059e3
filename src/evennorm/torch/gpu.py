"""The GPU kernels as one differentiable operation on torch tensors, for eager mode, and for the operators of compilers.

Triton is loaded by the first tensor on a GPU. Where it cannot be, or a kernel fails, the composed form serves (`refusal`).
"""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.kernels import choose, reference, triton
from evennorm.torch import gpu_memory
from evennorm.torch.cpu import composed_backward, moments_of, plain, untransformed, wide
from evennorm.torch.namespace import xp
from evennorm.torch.refusal import refuse_after, refused
from evennorm.torch.signs import opened


def _chosen(there: bool) -> frozenset[torch.dtype]:
    names = (name for name in triton.DTYPES if choose("torch", name, device="cuda", compiled=there) == "triton")
    return frozenset(getattr(torch, name) for name in names)


SERVED = _chosen(True)
COMPILED = _chosen(triton.missing() is None)
"""What compilers are told of: in eager mode those who lack Triton are told so."""

DEVICE = "cuda"
"""The type of the devices that are served; tests in Triton's interpreter name another."""


def serves(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all are plain tensors on one GPU, Triton can serve it, and nobody transforms what is computed.

    Not for compilers' eyes.
    """
    if x.device.type != DEVICE or not plain(x):
        return False
    if any(tensor is not None and not (plain(tensor) and tensor.device == x.device) for tensor in others):
        return False
    return x.dtype in SERVED and untransformed() and not refused(x.dtype)


class _BatchNorm(torch.autograd.Function):
    """Saves x and the statistics, and one bit per element where a residual comes before the activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        geometry: Geometry,
        epsilon: float,
        negative_slope: float,
        group_size: int | None,
        statistic_shape: tuple[int, ...] | None,
        given: tuple[Tensor, None, Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:
        y, saved = gpu_memory.forward(
            geometry, x, gamma, beta, residual, epsilon, negative_slope, group_size, statistic_shape, given
        )
        mean, _, variance = saved.statistics
        # The mean is a constant: mean_low carries the derivative of both.
        ctx.mark_non_differentiable(*((mean,) if given is None else (mean, variance)))
        ctx.set_materialize_grads(False)
        ctx.call = geometry, epsilon, negative_slope, group_size, residual is not None, given is not None
        ctx.save_for_backward(x, gamma, beta, saved.signs, *saved.statistics)
        return y, *saved.statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None, *d_statistics: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gamma, beta, signs, *statistics = ctx.saved_tensors
        geometry, epsilon, negative_slope, group_size, has_residual, frozen = ctx.call
        dy = torch.zeros_like(x) if dy is None else dy.to(x.dtype)
        d_mean, d_variance = (None if d is None else d.contiguous() for d in d_statistics)
        if not torch.is_grad_enabled() and not refused(x.dtype):
            saved = gpu_memory.kernels().Saved(statistics, signs)
            try:
                g = gpu_memory.backward(
                    geometry,
                    dy,
                    x,
                    saved,
                    gamma,
                    beta,
                    has_residual,
                    epsilon,
                    negative_slope,
                    group_size,
                    d_mean,
                    d_variance,
                    frozen,
                )
                return *g, None, None, None, None, None, None
            except Exception as error:
                refuse_after(error, x.dtype)
        # A second derivative is coming, or a kernel failed: the composed form, which autograd sees through.
        if signs is not None:
            dy, negative_slope = torch.where(opened(geometry, x, signs, group_size), dy, negative_slope * dy), 1.0
        mean, mean_low, variance = statistics
        statistics = [mean, torch.zeros_like(mean) if mean_low is None else mean_low, variance]
        moments = moments_of(x, [statistic.reshape(-1, geometry.channel) for statistic in statistics])
        if frozen:
            moments = moments._replace(count=inf)  # as the kernels have it
        g = composed_backward(geometry, dy, x, moments, gamma, beta, epsilon, negative_slope, group_size, d_mean, d_variance)
        return g.x, g.gamma, g.beta, dy if has_residual else None, None, None, None, None, None, None


# Without the wrapper that looks for functorch's transforms, as `serves` has done: a third of the time on small arrays.
_apply = super(torch.autograd.Function, _BatchNorm).apply


def train(
    geometry: Geometry,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
    statistic_shape: tuple[int, ...] | None,
) -> tuple[Tensor, Moments] | None:
    """`Engine.train` for tensors that `serves` accepts, without a mask; gamma and beta flat. None where a kernel failed."""
    x = gpu_memory.dense(x, geometry, group_size)
    gamma, beta = contiguous(gamma), contiguous(beta)
    residual = None if residual is None else residual.to(x.dtype)
    try:
        y, *statistics = _apply(x, gamma, beta, residual, geometry, epsilon, negative_slope, group_size, statistic_shape)
    except Exception as error:
        refuse_after(error, x.dtype)
        return None
    return y, moments_of(x, statistics)


def again(
    geometry: Geometry,
    x: Tensor,
    moments: Moments,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
) -> Tensor:
    """The output of `train` once more, from its moments."""
    x = gpu_memory.dense(x, geometry, group_size)
    mean, mean_low, variance = (statistic.detach().contiguous() for statistic in moments[1:])
    given = mean, mean_low, variance
    gamma, beta = contiguous(gamma), contiguous(beta)
    residual = None if residual is None else residual.to(x.dtype)
    y, _ = gpu_memory.forward(geometry, x, gamma, beta, residual, epsilon, negative_slope, group_size, None, given)
    return y


def infer(
    geometry: Geometry,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> Tensor | None:
    """`Engine.infer` likewise, where no gradient is asked for."""
    x = gpu_memory.dense(x, geometry, None)
    rows = (contiguous(row) for row in (mean, variance, gamma, beta))
    try:
        return gpu_memory.inference(geometry, x, *rows, residual, epsilon, negative_slope)
    except Exception as error:
        refuse_after(error, x.dtype)
        return None


def infer_with_gradient(
    geometry: Geometry,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> Tensor | None:
    """`infer`, differentiable in x, gamma, beta and residual."""
    x = gpu_memory.dense(x, geometry, None)
    gamma, beta = contiguous(gamma), contiguous(beta)
    residual = None if residual is None else residual.to(x.dtype)
    # Copies: running statistics may go on before the backward pass.
    mean, variance = (row.to(wide(x), copy=True).contiguous() for row in (mean, variance))
    given = mean, None, variance
    try:
        return _apply(x, gamma, beta, residual, geometry, epsilon, negative_slope, None, None, given)[0]
    except Exception as error:
        refuse_after(error, x.dtype)
        return None


def follow(running: tuple[Tensor, Tensor, Tensor], moments: Moments, decay: float, unbiased: bool) -> Tensor | None:
    """`Engine.follow` for dense tensors of one precision. The answer stays on the device: nothing waits for it."""
    mean = moments.mean
    if moments.count == 0 or mean.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=mean.device)
    accepted = torch.empty((), dtype=torch.bool, device=mean.device)
    try:
        with gpu_memory.on_device_of(mean):
            gpu_memory.kernels().follow(gpu_memory.memory(), running, moments, decay, unbiased, accepted)
    except Exception as error:
        refuse_after(error, mean.dtype)
        return None
    return accepted


def operated(
    geometry: Geometry,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
) -> tuple[Tensor, ...]:
    """y and statistics, for an operator that has no second way of its own where a kernel fails."""
    x = gpu_memory.dense(x, geometry, group_size)
    if not refused(x.dtype):
        try:
            given = contiguous(gamma), contiguous(beta), residual, epsilon, negative_slope, group_size
            y, saved = gpu_memory.forward(geometry, x, *given)
            return y, *saved.statistics
        except Exception as error:
            refuse_after(error, x.dtype)
    x_view, residual_view = (None if t is None else geometry.view(xp, t, group_size) for t in (x, residual))
    y, moments = reference.forward(xp, x_view, gamma, beta, residual_view, None, epsilon, negative_slope)
    return geometry.restore(xp, y, tuple(x.shape)).contiguous(), *moments[1:]


def operated_backward(
    geometry: Geometry,
    dy: Tensor,
    x: Tensor,
    statistics: list[Tensor],
    gamma: Tensor,
    beta: Tensor,
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
    d_mean: Tensor | None,
    d_variance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgamma and dbeta likewise."""
    x = gpu_memory.dense(x, geometry, group_size)
    d_mean, d_variance = (contiguous(d) for d in (d_mean, d_variance))
    if not refused(x.dtype):
        try:
            saved = gpu_memory.kernels().Saved(statistics, None)
            given = gamma, beta, False, epsilon, negative_slope, group_size, d_mean, d_variance
            g = gpu_memory.backward(geometry, dy, x, saved, *given)
            return g.x, g.gamma, g.beta
        except Exception as error:
            refuse_after(error, x.dtype)
    moments = moments_of(x, statistics)
    g = composed_backward(geometry, dy, x, moments, gamma, beta, epsilon, negative_slope, group_size, d_mean, d_variance)
    return g.x.contiguous(), g.gamma, g.beta


def contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()
