"""Compute training by the formulas of `core`, for what the compiled kernels do not support."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from evennorm.core.call import Call
from evennorm.core.moments import Moments, count_of
from evennorm.kernels import reference
from evennorm.tensorflow.namespace import Tensor, xp

OPTIONAL = ("gamma", "beta", "residual")
"""The inputs besides x that have derivatives and may be missing."""


def train(
    call: Call,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Moments]:
    """Compute the reference kernel in both directions; TensorFlow differentiates its gradient again."""
    optional = dict(zip(OPTIONAL, (gamma, beta, residual), strict=True))
    given = [name for name, tensor in optional.items() if tensor is not None]

    @tf.custom_gradient
    def differentiable(x: Tensor, *tensors: Tensor) -> Any:
        inputs = {**dict.fromkeys(OPTIONAL), **dict(zip(given, tensors, strict=True))}
        y, moments = reference.forward(xp, call, x, **inputs, mask=mask)

        def gradient(dy: Tensor, _: Tensor, d_mean: Tensor, d_variance: Tensor) -> list[Tensor]:
            g = reference.backward(xp, call, dy, x, moments, **inputs, mask=mask, d_mean=d_mean, d_variance=d_variance)
            return [g.x, *(getattr(g, name) for name in given)]

        return (y, *moments[1:]), gradient

    y, *statistics = differentiable(x, *(optional[name] for name in given))
    return y, Moments(count_of(xp, reference.wide(xp, x), mask), *statistics)
