"""What the layer computes, in training and at inference, held against float64 NumPy."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from evennorm.keras import BatchNormalization
from tests.keras import textbook
from tests.keras.backend import array, precision, train

SHAPES = {
    "vector": ((9,), 0),
    "dense": ((64, 5), -1),
    "dense, channels first of all": ((6, 40), -2),
    "sequence": ((8, 7, 5), -1),
    "sequence, channels first": ((8, 5, 7), 1),
    "images": ((6, 7, 8, 3), 3),
    "images, channels first": ((6, 3, 7, 8), -3),
    "volumes": ((3, 4, 5, 6, 2), -1),
    "volumes, channel in the middle": ((3, 4, 5, 6, 2), 2),
    "two axes apart": ((6, 5, 4, 3), (1, 3)),
    "two adjacent axes, one negative": ((6, 5, 4, 3), (2, -1)),
}


def drawn(shape: tuple[int, ...], mean: float, std: float = 1.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, std, shape).astype("float32")


@pytest.mark.filterwarnings("ignore:.*one value per channel")
@pytest.mark.parametrize("name", SHAPES)
def test_training_on_every_axis(name: str) -> None:
    """y, and the statistics after one step, which weigh 1 - momentum."""
    shape, axis = SHAPES[name]
    x = drawn(shape, 1e4)
    layer = BatchNormalization(axis=axis, momentum=0.75)
    y = train(layer, x)
    expected = textbook.train(x, axis=axis)
    assert tuple(y.shape) == shape
    np.testing.assert_allclose(array(y), expected.y, rtol=0, atol=2e-6)
    assert tuple(layer.moving_mean.shape) == expected.mean.shape
    np.testing.assert_allclose(array(layer.moving_mean), 0.25 * expected.mean, rtol=1.2e-7)
    follows = x.size > expected.mean.size  # one value per channel has no variance to follow
    variance = 0.75 + 0.25 * expected.variance if follows else np.ones_like(expected.variance)
    np.testing.assert_allclose(array(layer.moving_variance), variance, rtol=2e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_inference_on_every_axis(name: str) -> None:
    shape, axis = SHAPES[name]
    rng = np.random.default_rng(1)
    size = textbook.parameter_shape(shape, axis)
    layer = BatchNormalization(axis=axis, epsilon=1e-4)
    layer.build(shape)
    gamma, beta, mean, variance = (rng.uniform(0.5, 2, size).astype("float32") for _ in range(4))
    layer.set_weights([gamma, beta, mean + 1e4, variance])
    x = drawn(shape, 1e4)
    expected = textbook.infer(x, layer.get_weights()[2], variance, gamma, beta, 1e-4, axis)
    np.testing.assert_allclose(array(layer(x)), expected, rtol=3e-7, atol=2e-6)
    np.testing.assert_allclose(array(layer(x, training=False)), expected, rtol=3e-7, atol=2e-6)


@pytest.mark.parametrize(("shape", "axis"), [((256, 8), -1), ((16, 12, 12, 3), -1), ((16, 3, 12, 12), 1)])
def test_a_large_mean_costs_nothing(shape: tuple[int, ...], axis: int) -> None:
    layer = BatchNormalization(axis=axis)
    for mean in (0.0, 1.0, 1e3, 1e4, -1e5):
        x = drawn(shape, mean)
        np.testing.assert_allclose(array(train(layer, x)), textbook.train(x, axis=axis).y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mean", [0.0, -1e5])
def test_moving_statistics_after_many_steps(mean: float) -> None:
    """500 compiled steps of momentum .99: plain float32 stands still beside the mean, .4 away from it at 1e5."""
    layer = BatchNormalization(momentum=0.99)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x = np.random.default_rng(2).normal(mean, 1.0, (500 * 16, 3)).astype("float32")
    model.fit(x, np.zeros_like(x), batch_size=16, shuffle=False, verbose=0)
    expected_mean, expected_variance = np.zeros(3), np.ones(3)
    for batch in x.astype("float64").reshape(500, 16, 3):
        expected_mean = 0.99 * expected_mean + 0.01 * batch.mean(0)
        expected_variance = 0.99 * expected_variance + 0.01 * batch.var(0)
    unit = np.spacing(np.abs(expected_mean).astype("float32")).astype("float64")
    assert (np.abs(array(layer.moving_mean) - expected_mean) <= np.maximum(unit, 1e-7)).all()
    np.testing.assert_allclose(array(layer.moving_variance), expected_variance, rtol=5e-6)
    expected = textbook.infer(x[:99], array(layer.moving_mean), array(layer.moving_variance))
    np.testing.assert_allclose(model.predict(x[:99], verbose=0), expected, rtol=3e-7, atol=2e-6)


def test_the_same_as_keras_after_training() -> None:
    """Near zero mean Keras's own layer is right: weights and outputs of both after 30 steps agree within rounding."""
    ours, theirs = BatchNormalization(momentum=0.9), keras.layers.BatchNormalization(momentum=0.9)
    for seed in range(30):
        x = drawn((32, 4, 4, 6), 0.3, 2.0, seed)
        np.testing.assert_allclose(array(train(ours, x)), array(train(theirs, x)), rtol=0, atol=3e-6)
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=5e-6, atol=1e-6)
    np.testing.assert_allclose(array(ours(x)), array(theirs(x)), rtol=0, atol=3e-6)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_without_gamma_or_beta(center: bool, scale: bool) -> None:
    layer = BatchNormalization(
        center=center, scale=scale, gamma_initializer=keras.initializers.Constant(3.0), beta_initializer="ones"
    )
    x = drawn((20, 3), 5.0)
    expected = textbook.train(x, gamma=3.0 if scale else 1.0, beta=1.0 if center else 0.0)
    np.testing.assert_allclose(array(train(layer, x)), expected.y, rtol=3e-7, atol=2e-6)
    assert [w.name for w in layer.weights] == (["gamma"] * scale + ["beta"] * center + ["moving_mean", "moving_variance"])


def assert_rounded(y: np.ndarray, expected: np.ndarray, roundoff: float, exact: float = 2e-6) -> None:
    """`y` is `expected`, up to `exact`, rounded once."""
    np.testing.assert_allclose(y, expected, rtol=1.01 * roundoff, atol=exact)


PRECISIONS = {  # policy: (compute dtype, variable dtype, unit roundoff of the result)
    "float16": ("float16", "float16", 2.0**-11),
    "bfloat16": ("bfloat16", "bfloat16", 2.0**-8),
    "float32": ("float32", "float32", 2.0**-24),
    "float64": ("float64", "float64", 2.0**-53),
    "mixed_float16": ("float16", "float32", 2.0**-11),
    "mixed_bfloat16": ("bfloat16", "float32", 2.0**-8),
}


@pytest.mark.parametrize("policy", PRECISIONS)
def test_precisions(policy: str) -> None:
    """Half precision is read and written, never computed in: the result is the exact one, rounded once."""
    compute, variable, roundoff = PRECISIONS[policy]
    with precision(compute):
        x = keras.ops.cast(keras.ops.convert_to_tensor(drawn((200, 5), 100.0, 10.0)), compute)
        layer = BatchNormalization(dtype=policy, momentum=0.5)
        y = train(layer, x)
        expected = textbook.train(array(x))
        assert keras.backend.standardize_dtype(y.dtype) == compute
        assert {w.dtype for w in layer.weights} == {variable}
        exact = 1e-14 if compute == "float64" else 2e-6
        assert_rounded(array(y), expected.y, roundoff, exact)
        unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-23, "float64": 2.0**-50}[variable]
        np.testing.assert_allclose(array(layer.moving_mean), 0.5 * expected.mean, rtol=unit)
        np.testing.assert_allclose(array(layer.moving_variance), 0.5 + 0.5 * expected.variance, rtol=unit + exact)
        inferred = textbook.infer(array(x), array(layer.moving_mean), array(layer.moving_variance))
        assert_rounded(array(layer(x)), inferred, roundoff, exact)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_whole_numbers_are_not_rounded_first(policy: str, dtype: str) -> None:
    """257 has no bfloat16, and 70000 no float16: whole numbers are taken as float32, whatever the layer computes in."""
    high = 255 if dtype == "uint8" else 100_000
    x = np.random.default_rng(3).integers(high - 200, high, (100, 2)).astype(dtype)
    y = array(train(BatchNormalization(dtype=policy), x))
    assert_rounded(y, textbook.train(x).y, PRECISIONS[policy][2])


def test_unknown_batch_and_spatial_sizes() -> None:
    """One layer built for (None, None, None, 3) takes every size, in training and at inference."""
    layer = BatchNormalization(momentum=0.5)
    model = keras.Model(inputs := keras.Input((None, None, 3)), layer(inputs))
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse")
    mean, variance = np.zeros(3), np.ones(3)
    for seed, shape in enumerate([(4, 5, 6, 3), (7, 3, 2, 3)]):
        x = drawn(shape, 50.0, 3.0, seed)
        expected = textbook.train(x)
        loss = model.train_on_batch(x, np.zeros_like(x))
        np.testing.assert_allclose(float(loss), np.mean(expected.y**2), rtol=1e-5)
        mean, variance = 0.5 * mean + 0.5 * expected.mean, 0.5 * variance + 0.5 * expected.variance
        np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=1e-6)
        np.testing.assert_allclose(array(layer.moving_variance), variance, rtol=1e-5)
        np.testing.assert_allclose(model.predict(x, verbose=0), textbook.infer(x, mean, variance), rtol=0, atol=1e-5)
