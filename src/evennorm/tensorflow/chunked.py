"""Views in, y and Moments out: training by the formulas of `core`, piece by piece (chunks.py).

Where `core` recomputes in backward the sign that the activation saw, it is read off y here. Kept for backward are y, which
is the next layer's x, and x; or x without its mean, where it is one piece.
"""

from __future__ import annotations

from itertools import starmap
from typing import Any

import tensorflow as tf

from evennorm.core.moments import Moments, moments
from evennorm.core.normalize import Gradients, input_gradient, normalize
from evennorm.kernels import reference
from evennorm.tensorflow.centred import Centred, centred_and_moments
from evennorm.tensorflow.chunks import Piece, cut, joined, later, total, total_product
from evennorm.tensorflow.composed import OPTIONAL, differentiated_as
from evennorm.tensorflow.namespace import Tensor, xp


def train(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    negative_slope: float,
    number: int,
) -> tuple[Tensor, Moments]:
    """`composed.train` in a `number` of pieces: one group, no mask, an activation that keeps the sign of its input."""
    optional = dict(zip(OPTIONAL, (gamma, beta, residual), strict=True))
    given = [name for name, tensor in optional.items() if tensor is not None]
    options: dict[str, Any] = {"epsilon": epsilon, "negative_slope": negative_slope}

    def named(tensors: Any) -> dict[str, Any]:
        return {**dict.fromkeys(OPTIONAL), **dict(zip(given, tensors, strict=True))}

    @tf.custom_gradient
    def differentiable(x: Tensor, *tensors: Tensor) -> Any:
        # Of tensors that stand still, so that no tape keeps what happens between the pieces.
        still = tuple(map(tf.stop_gradient, (x, *tensors)))
        centred, statistics = centred_and_moments(still[0], number)
        remaining = statistics._replace(mean=None)
        y = _forward(centred, remaining, **named(still[1:]), dtype=x.dtype, **options)

        def gradient(dy: Tensor, _: Tensor, d_mean: Tensor, d_variance: Tensor) -> Any:
            def fast(dy: Tensor, d_mean: Tensor, d_variance: Tensor, _: Tensor, *tensors: Tensor) -> list[Tensor]:
                g = _backward(dy, d_mean, d_variance, y, centred, remaining, **named(tensors), **options)
                return [g.x, *(getattr(g, name) for name in given)]

            def composed(dy: Tensor, d_mean: Tensor, d_variance: Tensor, x: Tensor, *tensors: Tensor) -> list[Tensor]:
                again = moments(xp, reference.wide(xp, x))
                moved = {"d_mean": d_mean, "d_variance": d_variance}
                g = reference.backward(xp, dy, x, again, **named(tensors), mask=None, **options, **moved)
                return [g.x, *(getattr(g, name) for name in given)]

            return differentiated_as(composed, fast)(dy, d_mean, d_variance, x, *tensors)

        return (y, *statistics[1:]), gradient

    _, outer, _, inner = xp.shape(x)
    y, *statistics = differentiable(x, *(optional[name] for name in given))
    return y, Moments(outer * inner, *statistics)


def _forward(
    centred: Centred,
    remaining: Moments,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    dtype: tf.DType,
    epsilon: float,
    negative_slope: float,
) -> Tensor:
    def normalized(piece: Piece | None) -> Tensor:
        added = None if residual is None else reference.wide(xp, cut(residual, piece))
        z = normalize(xp, centred.piece(piece), remaining, gamma, beta, epsilon, residual=added)
        return tf.cast(_activated(z, negative_slope), dtype)

    return joined(map(normalized, centred.where))


def _backward(
    dy: Tensor,
    d_mean: Tensor,
    d_variance: Tensor,
    y: Tensor,
    centred: Centred,
    remaining: Moments,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    epsilon: float,
    negative_slope: float,
) -> Gradients:
    """`core.normalize.gradients`: every piece once for the sums, and once more for dx."""
    where = centred.where

    def dz_and_x(piece: Piece | None, dy: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        dz = _through_activation(cut(dy, piece), cut(y, piece), negative_slope)
        return reference.wide(xp, dz), centred._replace(x=x).piece(piece)

    parts = [dz_and_x(piece, dy, y, centred.x) for piece in where]
    sum_dz = total((dz for dz, _ in parts), where)
    sum_dz_centred = total_product(parts, where) - sum_dz * tf.cast(remaining.mean_low, tf.float64)
    sums = tf.cast(sum_dz, tf.float32), tf.cast(sum_dz_centred, tf.float32)
    if len(where) > 1:
        again = later([dy, y, centred.x], sums)
        parts = [dz_and_x(piece, *again) for piece in where]
    else:
        parts = [tuple(later(parts[0], sums))]

    def dx(dz: Tensor, x: Tensor) -> Tensor:
        found = input_gradient(xp, dz, x, remaining, gamma, epsilon, *sums, None, d_mean, d_variance)
        return tf.cast(found, dy.dtype)

    d_gamma = None if gamma is None else (sums[1] / tf.sqrt(remaining.variance + epsilon))[0]
    d_beta = None if beta is None else sums[0][0]
    d_residual = None if residual is None else tf.cast(_through_activation(dy, y, negative_slope), residual.dtype)
    return Gradients(joined(starmap(dx, parts)), d_gamma, d_beta, d_residual)


def _activated(z: Tensor, negative_slope: float) -> Tensor:
    if negative_slope == 1:
        return z
    return tf.nn.relu(z) if negative_slope == 0 else tf.nn.leaky_relu(z, negative_slope)


def _through_activation(dy: Tensor, y: Tensor, negative_slope: float) -> Tensor:
    """dz, by the sign of y, which is that of z."""
    if negative_slope == 1:
        return dy
    if negative_slope == 0:
        return tf.raw_ops.ReluGrad(gradients=dy, features=y)
    return tf.raw_ops.LeakyReluGrad(gradients=dy, features=y, alpha=negative_slope)
