"""The differentiable operation on torch tensors: `core`'s forward and backward under one autograd.Function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from evennorm.core.engine import Engine
from evennorm.core.moments import Moments, count_of
from evennorm.kernels import reference
from evennorm.torch.namespace import xp

__all__ = ["batch_norm", "engine", "normalize"]


class _BatchNorm(torch.autograd.Function):
    """Saves x and the statistics. The statistics are outputs too, so that a second derivative passes through them."""

    @staticmethod
    def forward(
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        epsilon: float,
        negative_slope: float,
    ) -> tuple[Tensor, ...]:
        y, moments = reference.forward(xp, x, gamma, beta, residual, mask, epsilon, negative_slope)
        return y, moments.mean, moments.mean_low, moments.variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, gamma, beta, residual, mask, ctx.epsilon, ctx.negative_slope = inputs
        _, mean, mean_low, variance = output
        ctx.mark_non_differentiable(mean)
        ctx.save_for_backward(x, gamma, beta, residual, mask, mean, mean_low, variance)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor, d_mean: Tensor, d_variance: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, residual, mask, *statistics = ctx.saved_tensors
        moments = Moments(count_of(xp, reference.wide(xp, x), mask), *statistics)
        g = reference.backward(
            xp, dy, x, moments, gamma, beta, residual, mask, ctx.epsilon, ctx.negative_slope, d_mean, d_variance
        )
        return *g, None, None, None


def _train(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> tuple[Tensor, Moments]:
    y, *statistics = _BatchNorm.apply(x, gamma, beta, residual, mask, epsilon, negative_slope)
    return y, Moments(count_of(xp, reference.wide(xp, x), mask), *statistics)


engine = Engine("torch", xp, _train, partial(reference.inference, xp))
batch_norm = engine.batch_norm
normalize = engine.normalize
