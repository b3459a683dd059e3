"""What neither Keras has: activation and residual in the layer, ghost batches, cumulative averages, unbiased variances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from evennorm.keras import BatchNormalization
from tests.keras import textbook
from tests.keras.backend import array, gradients, train

SHAPE = (12, 4, 5)


def drawn(seed: int, shape: tuple[int, ...] = SHAPE, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.5, shape).astype("float32")


def squeezed(x: Any) -> Any:
    return keras.ops.tanh(x) + 0.1 * x


def relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0)


ACTIVATIONS: dict[str, tuple[Any, Callable[[np.ndarray], np.ndarray]]] = {
    "None": (None, lambda z: z),
    "linear": ("linear", lambda z: z),
    "relu": ("relu", relu),
    "relu function": (keras.activations.relu, relu),
    "leaky_relu": ("leaky_relu", lambda z: np.where(z > 0, z, 0.2 * z)),
    "relu6": ("relu6", lambda z: np.clip(z, 0, 6)),
    "tanh": ("tanh", np.tanh),
    "LeakyReLU layer": (keras.layers.LeakyReLU(0.3), lambda z: np.where(z > 0, z, 0.3 * z)),
    "custom": (squeezed, lambda z: np.tanh(z) + 0.1 * z),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("given", [{}, {"renorm": True}, {"mode": 2}], ids=str)
def test_activation_comes_last(name: str, given: dict[str, Any]) -> None:
    activation, reference = ACTIVATIONS[name]
    layer = BatchNormalization(activation=activation, **given)
    x, r = drawn(1), drawn(2)
    z = textbook.train(x).y
    if given.get("renorm"):
        z = array(BatchNormalization(**given)(x, training=True))
    np.testing.assert_allclose(array(layer(x, training=True)), reference(z), rtol=0, atol=3e-6)
    if not given.get("renorm"):
        np.testing.assert_allclose(array(layer(x, training=True, residual=r)), reference(z + r), rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_at_inference_and_in_mode_1(name: str) -> None:
    activation, reference = ACTIVATIONS[name]
    layer = BatchNormalization(activation=activation)
    layer.build(SHAPE)
    layer.moving_mean.assign(np.full(5, 0.5))
    x, r = drawn(3), drawn(4)
    z = textbook.infer(x, 0.5, 1.0)
    np.testing.assert_allclose(array(layer(x)), reference(z), rtol=0, atol=3e-6)
    np.testing.assert_allclose(array(layer(x, residual=r)), reference(z + r), rtol=0, atol=3e-6)
    each = BatchNormalization(activation=activation, mode=1)
    z = array(BatchNormalization(mode=1)(x))
    np.testing.assert_allclose(array(each(x, residual=r)), reference(z + r), rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("activation", "axis"),
    [("relu", 1), ("relu6", 1), ("leaky_relu", -1), ("gelu", 1), (squeezed, -1)],
    ids=["relu", "relu6", "leaky_relu", "gelu", "custom"],
)
def test_the_same_as_separate_layers(activation: Any, axis: int) -> None:
    """Values, gradients, statistics: BN with residual and activation against BN, Add and Activation."""
    rng = np.random.default_rng(5)
    x, r, dy = (rng.normal(size=(8, 5, 5)).astype("float32") for _ in range(3))

    class Separate(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.normalization = BatchNormalization(axis=axis)

        def call(self, inputs: Any, residual: Any, training: bool | None = None) -> Any:
            z = self.normalization(inputs, training=training) + residual
            return keras.activations.get(activation)(z)

    r = 5 * r if activation == "relu6" else r
    fused, separate = BatchNormalization(axis=axis, activation=activation), Separate()
    residual = keras.ops.convert_to_tensor(r)
    for layer in (fused, separate):
        layer(x, residual=residual)
    expected = separate(x, residual=residual, training=True)
    np.testing.assert_allclose(array(fused(x, residual=residual, training=True)), array(expected), rtol=0, atol=2e-6)
    received, wanted = (gradients(layer, x, dy, residual=residual) for layer in (fused, separate))
    for ours, theirs in zip(received, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(fused.get_weights(), separate.normalization.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_gradient_of_the_residual() -> None:
    """The gradient passes where the activation is on, whatever the normalization."""
    rng = np.random.default_rng(6)
    x, r, dy = (rng.normal(size=(9, 4)).astype("float32") for _ in range(3))

    class OfResidual(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.normalization = BatchNormalization(activation="relu")

        def call(self, inputs: Any, training: bool | None = None) -> Any:
            return self.normalization(keras.ops.convert_to_tensor(x), residual=inputs, training=training)

    layer = OfResidual()
    layer(r)
    expected = np.where(textbook.train(x).y + r > 0, dy, 0.0)
    np.testing.assert_allclose(gradients(layer, r, dy)[0], expected, rtol=0, atol=1e-6)


def test_a_residual_at_a_large_mean() -> None:
    x, r = drawn(7, mean=1e5), drawn(8)
    y = array(train(BatchNormalization(), x, residual=r))
    np.testing.assert_allclose(y, textbook.train(x).y + r, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("size", "axis"), [(4, 1), (3, -1), (1, -1)])
def test_ghost_batches(size: int, axis: int) -> None:
    """Each group of samples is normalized by itself; the moving statistics follow the groups' average."""
    x = drawn(9, mean=1e4)
    layer = BatchNormalization(axis=axis, virtual_batch_size=size, momentum=0.5)
    groups = [textbook.train(x[start : start + size], axis=axis) for start in range(0, 12, size)]
    y = array(train(layer, x))
    np.testing.assert_allclose(y, np.concatenate([group.y for group in groups]), rtol=0, atol=2e-6)
    mean = np.mean([group.mean for group in groups], axis=0)
    variance = np.mean([group.variance for group in groups], axis=0)
    np.testing.assert_allclose(array(layer.moving_mean), 0.5 * mean, rtol=1e-7)
    np.testing.assert_allclose(array(layer.moving_variance), 0.5 + 0.5 * variance, rtol=1e-6)
    inferred = textbook.infer(x, array(layer.moving_mean), array(layer.moving_variance), axis=axis)
    np.testing.assert_allclose(array(layer(x)), inferred, rtol=3e-7, atol=2e-6)


def test_ghost_batches_with_a_mask_and_their_gradients() -> None:
    x, dy = drawn(10), drawn(11)
    mask = np.random.default_rng(12).random(SHAPE[:2]) < 0.7
    layer = BatchNormalization(virtual_batch_size=6)
    layer.build(SHAPE)
    d_x, d_gamma, d_beta = gradients(layer, x, dy, mask=mask)
    halves = [textbook.gradients(x[h], np.ones(5), dy[h], where=mask[h, :, None]) for h in (slice(0, 6), slice(6, 12))]
    np.testing.assert_allclose(d_x, np.concatenate([half[0] for half in halves]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_gamma, halves[0][1] + halves[1][1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_beta, halves[0][2] + halves[1][2], rtol=1e-5, atol=1e-5)


def test_cumulative_average() -> None:
    """momentum=None: the plain average over all batches, exact from the first one on, even far from the initial values."""
    layer = BatchNormalization(momentum=None, moving_variance_initializer="ones")
    means, variances = [], []
    for seed in range(20):
        x = np.random.default_rng(seed).normal(1e4, 1e-2, (32, 3)).astype("float32")
        layer(x, training=True)
        expected = textbook.train(x)
        means.append(expected.mean)
        variances.append(expected.variance)
        np.testing.assert_allclose(array(layer.moving_mean), np.mean(means, axis=0), rtol=1.2e-7)
        np.testing.assert_allclose(array(layer.moving_variance), np.mean(variances, axis=0), rtol=2e-5)
    assert [w.name for w in layer.weights][-1] == "num_batches"
    assert int(array(layer.num_batches)) == 20


def test_cumulative_average_in_fit() -> None:
    layer = BatchNormalization(momentum=None)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile("sgd", "mse")
    x = drawn(13, (40, 3), 2.0)
    model.fit(x, x, batch_size=8, epochs=2, shuffle=False, verbose=0)
    batches = x.astype("float64").reshape(5, 8, 3)
    np.testing.assert_allclose(array(layer.moving_mean), batches.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), batches.var(1).mean(0), rtol=1e-5)
    assert int(array(layer.num_batches)) == 10


@pytest.mark.parametrize("shape", [(2, 3), (9, 3), (6, 4, 3)])
def test_unbiased_variance(shape: tuple[int, ...]) -> None:
    """The moving variance follows n / (n - 1) times the batch's, as PyTorch's does; the output does not change."""
    x = drawn(14, shape)
    n = np.prod(shape[:-1])
    layer, biased = BatchNormalization(momentum=0.0, unbiased_variance=True), BatchNormalization(momentum=0.0)
    np.testing.assert_array_equal(array(train(layer, x)), array(train(biased, x)))
    np.testing.assert_allclose(array(layer.moving_variance), textbook.train(x).variance * n / (n - 1), rtol=1e-5)


def test_unbiased_variance_counts_what_the_mask_leaves_and_what_a_ghost_batch_holds() -> None:
    x = drawn(15)
    mask = np.arange(48).reshape(12, 4) % 3 > 0
    layer = BatchNormalization(momentum=0.0, unbiased_variance=True)
    train(layer, x, mask=mask)
    expected = np.var(x.astype("float64")[mask], axis=0, ddof=1)
    np.testing.assert_allclose(array(layer.moving_variance), expected, rtol=1e-5)
    layer = BatchNormalization(momentum=0.0, unbiased_variance=True, virtual_batch_size=6)
    train(layer, x)
    expected = np.mean([np.var(half.astype("float64").reshape(-1, 5), axis=0, ddof=1) for half in (x[:6], x[6:])], axis=0)
    np.testing.assert_allclose(array(layer.moving_variance), expected, rtol=1e-5)
