"""Derivatives through the layer, by the backend's own differentiation, held against float64 formulas."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from evennorm.keras import BatchNormalization
from tests.keras import textbook
from tests.keras.backend import array, gradients, precision, second_derivatives

SHAPES = [((64, 5), -1), ((8, 6, 6, 3), -1), ((8, 3, 6, 6), 1), ((6, 5, 4, 3), (1, 3))]


def arrays(shape: tuple[int, ...], axis: int | tuple[int, ...], mean: float) -> tuple[np.ndarray, ...]:
    """x, dy, gamma, beta."""
    rng = np.random.default_rng(4)
    size = textbook.parameter_shape(shape, axis)
    x = rng.normal(mean, 1.0, shape).astype("float32")
    dy = rng.normal(size=shape).astype("float32")
    return x, dy, *(rng.uniform(0.5, 1.5, size).astype("float32") for _ in range(2))


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_gradients(shape: tuple[int, ...], axis: int | tuple[int, ...], mean: float) -> None:
    x, dy, gamma, beta = arrays(shape, axis, mean)
    layer = BatchNormalization(axis=axis)
    layer.build(shape)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    for received, expected in zip(gradients(layer, x, dy), textbook.gradients(x, gamma, dy, axis=axis), strict=True):
        np.testing.assert_allclose(received, expected, rtol=1e-6, atol=1e-5)


def test_keras_differentiates_the_same() -> None:
    x, dy, _, _ = arrays((64, 5), -1, 0.0)
    ours, theirs = BatchNormalization(), keras.layers.BatchNormalization()
    for layer in (ours, theirs):
        layer.build(x.shape)
    for mine, other in zip(gradients(ours, x, dy), gradients(theirs, x, dy), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


def test_gradients_in_half_precision() -> None:
    """Gradients of weights that are float32 come in float32; that of x is rounded once, to the precision of x."""
    x, dy, _, _ = arrays((64, 5), -1, 10.0)
    layer = BatchNormalization(dtype="mixed_bfloat16")
    layer.build(x.shape)
    x, dy = (array(keras.ops.cast(keras.ops.convert_to_tensor(a), "bfloat16")) for a in (x, dy))
    d_x, d_gamma, d_beta = gradients(layer, x, dy)
    expected = textbook.gradients(x, np.ones(5), dy)
    np.testing.assert_allclose(d_x, expected[0], rtol=2.0**-8, atol=2e-5)
    # dy reaches the layer unrounded, so that sums of it are exact to float32.
    np.testing.assert_allclose(d_gamma, expected[1], rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(d_beta, expected[2], rtol=1e-6, atol=1e-5)


def test_gradients_at_inference_take_the_statistics_as_constants() -> None:
    """A frozen layer is y = x * a + b: that is its derivative too, although `training` is true."""
    x, dy, _, _ = arrays((64, 5), -1, 3.0)
    layer = BatchNormalization(gamma_initializer=keras.initializers.Constant(2.0))
    layer.build(x.shape)
    layer.moving_variance.assign(np.full(5, 4.0))
    layer.trainable = False
    (d_x,) = gradients(layer, x, dy)
    np.testing.assert_allclose(d_x, 2 * dy / np.sqrt(4.0 + 1e-3), rtol=1e-6)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_second_derivatives(activation: str | None) -> None:
    """What a gradient penalty needs, against central differences of the first derivative's formula."""
    with precision("float64"):
        rng = np.random.default_rng(5)
        x, dy, w = (rng.normal(size=(9, 3)) for _ in range(3))
        layer = BatchNormalization(dtype="float64", activation=activation)
        layer.build(x.shape)

        def weighted_gradient(x: np.ndarray) -> float:
            through = dy if activation is None else np.where(textbook.train(x).y > 0, dy, 0.0)
            return (textbook.gradients(x, np.ones(3), through)[0] * w).sum()

        expected = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[index] = 1e-5
            expected[index] = (weighted_gradient(x + step) - weighted_gradient(x - step)) / 2e-5
        np.testing.assert_allclose(second_derivatives(layer, x, dy, w), expected, rtol=0, atol=1e-7)
