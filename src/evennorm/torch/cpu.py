"""The compiled CPU kernels as one differentiable operation on torch tensors, for eager mode."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from evennorm.core.geometry import Geometry
from evennorm.core.moments import Moments
from evennorm.core.normalize import Gradients
from evennorm.kernels import choose, cpu, reference
from evennorm.torch.namespace import xp

_DTYPES = {getattr(torch, name): number for name, number in cpu.DTYPES.items()}
SERVED = frozenset(getattr(torch, name) for name in cpu.DTYPES if choose("torch", name) == "cpu")


def wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


memory = cpu.Memory(
    address=Tensor.data_ptr,
    strides=Tensor.stride,
    sizes=lambda x: tuple(x.shape),
    empty_like=torch.empty_like,
    empty_contiguous=lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
    from_dlpack=torch.from_dlpack,
    empty=lambda shape, x: x.new_empty(*shape) if x.dtype is torch.float32 else torch.empty(shape, dtype=wide(x)),
    empty_bytes=lambda size: torch.empty(size, dtype=torch.uint8),
    copy_like=lambda x, y: torch.empty_like(y).copy_(x),
    dtype=lambda x: _DTYPES[x.dtype],
    item_bytes=Tensor.element_size,
)


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def serves(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all are plain tensors in CPU memory, and nobody transforms what is computed. Not for compilers' eyes."""
    for tensor in (x, *others):
        if tensor is not None and not (plain(tensor) and tensor.is_cpu):
            return False
    return x.dtype in SERVED and untransformed()


def plain(tensor: Tensor) -> bool:
    """Whether it is an array in memory, and no subclass that stands for something else."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


def untransformed() -> bool:
    """Whether operations are computed as they are called: nobody vectorizes, traces or records them, or takes tangents."""
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


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
        given: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        y, saved = cpu.forward(
            memory,
            geometry,
            x,
            gamma,
            beta,
            residual,
            epsilon,
            negative_slope,
            group_size,
            None,
            statistic_shape,
            given,
        )
        mean, _, _ = saved.statistics
        # The mean is a constant: mean_low carries the derivative of both.
        ctx.mark_non_differentiable(*((mean,) if given is None else given))
        ctx.set_materialize_grads(False)
        ctx.call = geometry, epsilon, negative_slope, group_size, residual is not None, given is not None
        ctx.save_for_backward(x, gamma, beta, saved.signs, *saved.statistics)
        return y, *saved.statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None, *d_statistics: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gamma, beta, signs, *statistics = ctx.saved_tensors
        geometry, epsilon, negative_slope, group_size, has_residual, frozen = ctx.call
        if dy is None or dy.dtype is not x.dtype:
            dy = torch.zeros_like(x) if dy is None else dy.to(x.dtype)
        d_mean, d_variance = (None if d is None else d.contiguous() for d in d_statistics)
        saved = cpu.Saved(statistics, signs)
        given = x, saved, gamma, beta, has_residual, epsilon, negative_slope, group_size
        if not torch.is_grad_enabled():
            g = cpu.backward(memory, geometry, dy, *given, d_mean, d_variance, frozen)
            return *g, None, None, None, None, None, None
        # A second derivative is coming: the composed form, which autograd sees through.
        if signs is not None:
            with torch.no_grad():
                share = cpu.backward(memory, geometry, torch.ones_like(x), *given, given=frozen).residual
            dy, negative_slope = torch.where(share == 1, dy, negative_slope * dy), 1.0
        moments = moments_of(x, [statistic.reshape(-1, geometry.channel) for statistic in statistics])
        if frozen:
            moments = moments._replace(count=inf)  # as `kernels.cpu.backward` has it
        g = composed_backward(geometry, dy, x, moments, gamma, beta, epsilon, negative_slope, group_size, d_mean, d_variance)
        return g.x, g.gamma, g.beta, dy if has_residual else None, None, None, None, None, None, None


# Without the wrapper that looks for functorch's transforms, as `serves` has done: a third of the time on small arrays.
_apply = super(torch.autograd.Function, _BatchNorm).apply


def composed_backward(
    geometry: Geometry,
    dy: Tensor,
    x: Tensor,
    moments: Moments,
    gamma: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
    negative_slope: float,
    group_size: int | None,
    d_mean: Tensor | None,
    d_variance: Tensor | None,
) -> Gradients:
    dy_view, x_view = (geometry.view(xp, tensor, group_size) for tensor in (dy, x))
    g = reference.backward(
        xp, dy_view, x_view, moments, gamma, beta, None, None, epsilon, negative_slope, d_mean, d_variance
    )
    return g._replace(x=geometry.restore(xp, g.x, tuple(x.shape)))


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
    """`Engine.train` for tensors that `serves` accepts, without a mask; gamma and beta flat."""
    dtype = wide(x)
    gamma, beta = dense(gamma, dtype), dense(beta, dtype)
    residual = None if residual is None else residual.to(x.dtype)
    y, *statistics = _apply(x, gamma, beta, residual, geometry, epsilon, negative_slope, group_size, statistic_shape)
    return y, moments_of(x, statistics)


def moments_of(x: Tensor, statistics: Sequence[Tensor]) -> Moments:
    mean, mean_low, variance = statistics
    return Moments(x.numel() // max(1, mean.numel()), mean, mean_low, variance)


def dense(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if parameter is None or (parameter.dtype is dtype and parameter.is_contiguous()):
        return parameter
    return parameter.to(dtype).contiguous()


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
    dtype = wide(x)
    given = [dense(statistic.detach(), dtype) for statistic in moments[1:]]
    gamma, beta = dense(gamma, dtype), dense(beta, dtype)
    residual = None if residual is None else residual.to(x.dtype)
    y, _ = cpu.forward(memory, geometry, x, gamma, beta, residual, epsilon, negative_slope, group_size, given=given)
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
) -> Tensor:
    """`Engine.infer` likewise, where no gradient is asked for."""
    dtype = wide(x)
    residual = None if residual is None else residual.to(x.dtype)
    return cpu.inference(
        memory,
        geometry,
        x,
        dense(mean, dtype),
        dense(variance, dtype),
        dense(gamma, dtype),
        dense(beta, dtype),
        residual,
        epsilon,
        negative_slope,
    )


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
) -> Tensor:
    """`infer`, differentiable in x, gamma, beta and residual."""
    dtype = wide(x)
    gamma, beta = dense(gamma, dtype), dense(beta, dtype)
    residual = None if residual is None else residual.to(x.dtype)
    # Copies: running statistics may go on before the backward pass.
    mean, variance = mean.to(dtype, copy=True), variance.to(dtype, copy=True)
    given = mean, torch.zeros_like(mean), variance
    y, *_ = _apply(x, gamma, beta, residual, geometry, epsilon, negative_slope, None, None, given)
    return y
