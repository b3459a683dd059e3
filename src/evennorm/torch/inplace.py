"""Write the output of batch normalization over its input, which the backward pass recovers from the output.

Rota Bulo, Porzi & Kontschieder 2018, "In-place activated BatchNorm", arXiv 1712.02616. One tensor is kept for normalization
and activation together, and it is the one that the next layer keeps anyway. `core.inversion` has the formulas.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import elu

from evennorm.core.activation import Activation, activate
from evennorm.core.call import Call
from evennorm.core.inversion import gradients_from_output, least_gamma
from evennorm.core.moments import Moments, count_of
from evennorm.errors import ArgumentError
from evennorm.kernels import reference
from evennorm.torch.backend import engine
from evennorm.torch.errors import TensorError
from evennorm.torch.namespace import xp
from evennorm.torch.tensors import acc_dtype


class Invertible(NamedTuple):
    """What follows normalization: nothing, leaky relu, or elu where `alpha` is not None."""

    negative_slope: float = 1.0
    alpha: float | None = None

    def inverted(self, y: Tensor, dy: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return z with y = activation(z), and the derivative of the loss by z; `dtype` is the one that y was kept in."""
        if self.alpha is None:
            return activate(xp, y, Activation(1 / self.negative_slope)), torch.where(y <= 0, self.negative_slope * dy, dy)
        # Where rounding has made y -alpha, take the next number instead: z would be infinite.
        below = torch.log1p(torch.clamp(y / self.alpha, min=-1 + torch.finfo(dtype).eps / 2))
        return torch.where(y <= 0, below, y), torch.where(y <= 0, (y + self.alpha) * dy, dy)

    @property
    def least_slope(self) -> float:
        """The derivative of the activation just below zero; at most 1 for elu."""
        return self.negative_slope if self.alpha is None else min(1.0, self.alpha)


class _InPlace(torch.autograd.Function):
    """In-place normalization. It saves y and the variance, which are outputs, so that a second derivative passes through
    them."""

    @staticmethod
    def forward(
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        mask: Tensor | None,
        count: Any,
        call: Call,
        alpha: float | None,
    ) -> tuple[Tensor, ...]:
        y, moments = engine.train(call, x, gamma, beta, mask=mask)
        x.copy_(y if alpha is None else elu(y, alpha, inplace=True))
        return x, moments.mean, moments.mean_low, moments.variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, gamma, beta, mask, count, ctx.call, ctx.alpha = inputs
        y, mean, mean_low, variance = output
        ctx.mark_dirty(x)
        ctx.mark_non_differentiable(mean, mean_low)
        ctx.count = None if isinstance(count, Tensor) else count
        ctx.save_for_backward(y, variance, gamma, beta, mask, count if ctx.count is None else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor, __: Tensor, d_variance: Tensor) -> tuple[Tensor | None, ...]:
        y, variance, gamma, beta, mask, count = ctx.saved_tensors
        call, sizes = ctx.call, xp.shape(y)
        geometry, activation = call.geometry, Invertible(call.activation.slope, ctx.alpha)
        z, dz = (reference.wide(xp, geometry.view(xp, tensor, call.group_size)) for tensor in (y, dy))
        z, dz = activation.inverted(z, dz, y.dtype)
        if mask is not None:
            mask = geometry.mask_view(xp, mask, sizes, call.group_size)
        count = count if ctx.count is None else ctx.count
        g = gradients_from_output(xp, dz, z, count, variance, gamma, beta, call.epsilon, mask, d_variance)
        dx = geometry.restore(xp, g.x, sizes).to(y.dtype)
        return dx, g.gamma, g.beta, None, None, None, None


def train(
    call: Call,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    alpha: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """Compute `Engine.train` in x's own memory, followed by an elu of `alpha` where that is not None.

    Raises:
        TensorError: x is a leaf that requires a gradient, or a view of another tensor.
        ArgumentError: |gamma| is too small to divide by.
    """
    _check_input(x, gamma, beta)
    if gamma is not None:
        _check_gamma(
            gamma.detach(), None if beta is None else beta.detach(), x.dtype, Invertible(call.activation.slope, alpha)
        )
    mask = None if mask is None else xp.boolean(mask)
    count = _count(call, x, mask)
    y, *statistics = _InPlace.apply(x, gamma, beta, mask, count, call, alpha)
    return y, Moments(count, *statistics)


def _count(call: Call, x: Tensor, mask: Tensor | None) -> Any:
    if mask is None:
        return prod(x.shape[2:], start=x.shape[0] if call.group_size is None else call.group_size)
    like = torch.empty((), dtype=acc_dtype(x), device=x.device)
    return count_of(xp, like, call.geometry.mask_view(xp, mask, xp.shape(x), call.group_size))


def _check_input(x: Tensor, *parameters: Tensor | None) -> None:
    """Check, before anything is overwritten, what torch itself would only find out afterwards."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if x.requires_grad and x.is_leaf:
        raise TensorError(
            'a leaf Variable that requires grad is being used in an in-place operation: memory="inplace" overwrites its '
            'input; put an operation before it, or choose memory="save"'
        )
    if x._is_view() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        raise TensorError(
            'memory="inplace" overwrites its input, which is a view of another tensor here, sliced or transposed, '
            'say, and torch has no gradient for that; clone the input, or choose memory="save"'
        )


def _check_gamma(gamma: Tensor, beta: Tensor | None, dtype: torch.dtype, activation: Invertible) -> None:
    """Check gamma before anything is overwritten. This reads one number from the device, unless a program is recorded
    there."""
    info = torch.finfo(dtype)
    unit, smallest = info.eps / 2, info.tiny / activation.least_slope
    refused = gamma.abs() <= least_gamma(xp, gamma, beta, unit, smallest)
    rule = f"|gamma| has to be above {unit**0.5:.2g} times |beta| and above {smallest * unit**0.5:.2g} in {dtype}"
    if torch.compiler.is_compiling() or (gamma.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch._assert_async(~refused.any(), f"memory=inplace divides by gamma: {rule}")
    elif not gamma.is_meta and refused.any():
        worst = int(torch.where(refused, gamma.abs(), torch.inf).argmin())
        offset = "" if beta is None else f" and beta = {float(beta[worst]):.3g}"
        raise ArgumentError(
            f'memory="inplace" recovers its input by dividing by gamma, so that {rule}; received {int(refused.sum())} of '
            f"{gamma.numel()} channels that are not: channel {worst} has gamma = {float(gamma[worst]):.3g}{offset}; keep "
            'gamma away from 0, or choose memory="save"'
        )
