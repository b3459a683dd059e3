"""The kernels as operators that torch's compilers and exporters know: evennorm::batch_norm and its gradient.

In eager mode `evennorm.torch.cpu` and `gpu` serve, at half the cost per call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.core.normalize import activate
from evennorm.kernels import cpu
from evennorm.torch import gpu
from evennorm.torch.cpu import composed_backward, dense, memory, moments_of, wide
from evennorm.torch.namespace import xp


@torch.library.custom_op("evennorm::batch_norm", mutates_args=(), device_types="cpu")
def batch_norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    axis: list[int],
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and mean, mean_low and variance of (groups, channel). No activation behind a residual."""
    geometry = Geometry(x.shape, axis)
    gamma, beta = dense(gamma, wide(x)), dense(beta, wide(x))
    y, saved = cpu.forward(memory, geometry, x, gamma, beta, residual, epsilon, negative_slope, group_size)
    return y, *saved.statistics


@batch_norm.register_fake
def _(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    axis: list[int],
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channel = 1
    for a in axis:
        channel = channel * x.shape[a]
    groups = 1 if group_size is None else x.shape[0] // group_size
    mean, mean_low, variance = (x.new_empty((groups, channel), dtype=wide(x)) for _ in range(3))
    return torch.empty_like(x), mean, mean_low, variance


@batch_norm.register_kernel("cuda")
def _(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    axis: list[int],
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geometry = Geometry(x.shape, axis)
    y, *statistics = gpu.operated(geometry, x, gamma, beta, residual, epsilon, negative_slope, group_size)
    return _lying_like(y, x), *statistics


@torch.library.custom_op("evennorm::batch_norm_backward", mutates_args=(), device_types="cpu")
def batch_norm_backward(
    dy: Tensor,
    d_mean: Tensor | None,
    d_variance: Tensor | None,
    x: Tensor,
    mean: Tensor,
    mean_low: Tensor,
    variance: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    axis: list[int],
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgamma and dbeta, the last two also where there is no such parameter."""
    geometry = Geometry(x.shape, axis)
    shape = (geometry.channel,)
    ones, zeros = x.new_ones(shape, dtype=wide(x)), x.new_zeros(shape, dtype=wide(x))
    gamma, beta = (ones if gamma is None else dense(gamma, wide(x))), (zeros if beta is None else dense(beta, wide(x)))
    d_mean, d_variance = (None if d is None else d.contiguous() for d in (d_mean, d_variance))
    saved = cpu.Saved((mean.contiguous(), mean_low.contiguous(), variance.contiguous()), None)
    g = cpu.backward(
        memory, geometry, dy, x, saved, gamma, beta, False, epsilon, negative_slope, group_size, d_mean, d_variance
    )
    return g.x, g.gamma, g.beta


@batch_norm_backward.register_fake
def _(
    dy: Tensor,
    d_mean: Tensor | None,
    d_variance: Tensor | None,
    x: Tensor,
    mean: Tensor,
    mean_low: Tensor,
    variance: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    axis: list[int],
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *(x.new_empty((mean.shape[-1],), dtype=wide(x)) for _ in range(2))


@batch_norm_backward.register_kernel("cuda")
def _(
    dy: Tensor,
    d_mean: Tensor | None,
    d_variance: Tensor | None,
    x: Tensor,
    mean: Tensor,
    mean_low: Tensor,
    variance: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    axis: list[int],
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = Geometry(x.shape, axis)
    shape = (geometry.channel,)
    gamma = x.new_ones(shape, dtype=wide(x)) if gamma is None else dense(gamma, wide(x))
    beta = x.new_zeros(shape, dtype=wide(x)) if beta is None else dense(beta, wide(x))
    statistics = [statistic.contiguous() for statistic in (mean, mean_low, variance)]
    given = geometry, dy, x, statistics, gamma, beta, epsilon, negative_slope, group_size, d_mean, d_variance
    dx, d_gamma, d_beta = gpu.operated_backward(*given)
    return _lying_like(dx, x), d_gamma, d_beta


def _lying_like(result: Tensor, x: Tensor) -> Tensor:
    """`result` as a compiler was promised it: with the strides of `torch.empty_like(x)`."""
    promised = torch.empty_like(x)
    return result if result.stride() == promised.stride() else promised.copy_(result)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gamma, beta, residual, *ctx.call = inputs
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(output[1])  # a constant: mean_low carries the derivative of both
    ctx.save_for_backward(x, *output[1:], gamma, beta)


def _backward(ctx: Any, dy: Tensor, _: Any, d_mean: Tensor | None, d_variance: Tensor | None) -> tuple[Any, ...]:
    *given, gamma, beta = ctx.saved_tensors
    dx, d_gamma, d_beta = batch_norm_backward(dy, d_mean, d_variance, *given, gamma, beta, *ctx.call)
    return (
        dx,
        None if gamma is None else d_gamma.to(gamma.dtype),
        None if beta is None else d_beta.to(beta.dtype),
        dy if ctx.has_residual else None,
        *(None,) * len(ctx.call),
    )


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.axis, ctx.epsilon, ctx.negative_slope, ctx.group_size = inputs
    ctx.save_for_backward(*tensors)


def _second_backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
    """Through the composed form, which autograd differentiates itself."""
    given: list[Any] = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in ctx.saved_tensors]
    dy, d_mean, d_variance, x, *statistics, gamma, beta = given
    with torch.enable_grad():
        g = composed_backward(
            Geometry(x.shape, ctx.axis),
            dy,
            x,
            moments_of(x, statistics),
            gamma,
            beta,
            ctx.epsilon,
            ctx.negative_slope,
            ctx.group_size,
            d_mean,
            d_variance,
        )
        outputs = [(out, cotangent) for out, cotangent in zip(g[:3], cotangents, strict=True) if out is not None]
        values, directions = zip(*outputs, strict=True)
        wanted = [t for t in given if t is not None]
        found = iter(torch.autograd.grad(values, wanted, directions, allow_unused=True))
    return *(None if t is None else next(found) for t in given), None, None, None, None


batch_norm.register_autograd(_backward, setup_context=_save)
batch_norm_backward.register_autograd(_second_backward, setup_context=_save_all)


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
) -> tuple[Tensor, Moments]:
    """`Engine.train` under a compiler, for CPU tensors without a mask; gamma and beta flat."""
    # Behind a residual the compiler fuses the activation, and knows what its gradient needs.
    inside = 1.0 if residual is not None else negative_slope
    residual = None if residual is None else residual.to(x.dtype)
    y, *statistics = batch_norm(x, gamma, beta, residual, list(geometry.axis), epsilon, inside, group_size)
    if statistic_shape is not None:
        statistics = [statistic.reshape(statistic_shape) for statistic in statistics]
    return (y if residual is None else activate(xp, y, negative_slope)), moments_of(x, statistics)
