"""Keras 1's layer: its three modes by its own formulas, its weights, its signature, and its configs."""

from __future__ import annotations

import inspect
from pathlib import Path

import keras
import numpy as np
import pytest

from evennorm.errors import ArgumentError, ShapeError
from evennorm.keras import BatchNormalization, legacy
from tests.keras import textbook
from tests.keras.backend import array, gradients

EPSILON = 0.25  # large, so that an epsilon in the wrong place shows


def mode_1(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float = EPSILON) -> np.ndarray:
    """As Keras 1.2.2 has it: K.mean and K.var over the last axis, epsilon under the root and beside it."""
    x = x.astype("float64")
    mean = x.mean(axis=-1, keepdims=True)
    std = np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)
    return gamma * ((x - mean) / (std + epsilon)) + beta


def drawn(shape: tuple[int, ...], mean: float = 1.0) -> np.ndarray:
    return np.random.default_rng(9).normal(mean, 2.0, shape).astype("float32")


@pytest.mark.parametrize("axis", [-1, 1, 0])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (4, 5, 6), (2, 3, 4, 6)])
def test_mode_1_normalizes_each_sample_over_the_last_axis(shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(10)
    gamma, beta = rng.uniform(0.5, 2, (2, 6))
    layer = BatchNormalization(mode=1, axis=axis, epsilon=EPSILON, weights=[gamma, beta])
    x = drawn(shape)
    for training in (False, True):
        np.testing.assert_allclose(array(layer(x, training=training)), mode_1(x, gamma, beta), rtol=1e-6, atol=2e-6)
    layer.trainable = False
    np.testing.assert_allclose(array(layer(x, training=True)), mode_1(x, gamma, beta), rtol=1e-6, atol=2e-6)
    assert [w.shape for w in layer.weights] == [(6,)] * 4
    np.testing.assert_array_equal(array(layer.moving_mean), np.zeros(6))
    np.testing.assert_array_equal(array(layer.moving_variance), np.ones(6))


def test_mode_1_at_a_large_mean_and_of_one_sample_alone() -> None:
    layer = BatchNormalization(mode=1)
    x = drawn((40, 7), 1e5)
    expected = mode_1(x, np.ones(7), np.zeros(7), 1e-3)
    np.testing.assert_allclose(array(layer(x)), expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(array(layer(x[3:4])), expected[3:4], rtol=0, atol=2e-6)


def test_mode_1_gradients() -> None:
    """Against central differences of the formula."""
    rng = np.random.default_rng(11)
    x, dy = rng.normal(size=(2, 3, 4)).astype("float32")
    layer = BatchNormalization(mode=1, epsilon=EPSILON)
    layer.build(x.shape)

    def loss(x: np.ndarray) -> float:
        return (mode_1(x, np.ones(4), np.zeros(4)) * dy).sum()

    expected = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[index] = 1e-6
        expected[index] = (loss(x.astype("float64") + step) - loss(x.astype("float64") - step)) / 2e-6
    d_x, d_gamma, d_beta = gradients(layer, x, dy)
    np.testing.assert_allclose(d_x, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(d_gamma, (mode_1(x, np.ones(4), np.zeros(4)) * dy).sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_beta, dy.sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "axis"), [((20, 3), -1), ((5, 3, 4, 4), 1)])
def test_mode_2_takes_the_batchs_statistics_always(shape: tuple[int, ...], axis: int) -> None:
    layer = BatchNormalization(mode=2, axis=axis, epsilon=EPSILON)
    x = drawn(shape)
    expected = textbook.train(x, epsilon=EPSILON, axis=axis).y
    for frozen in (False, True):
        layer.trainable = not frozen
        for training in (None, False, True):
            np.testing.assert_allclose(array(layer(x, training=training)), expected, rtol=0, atol=2e-6)
    assert [w.name for w in layer.weights] == ["gamma", "beta", "moving_mean", "moving_variance"]
    np.testing.assert_array_equal(array(layer.moving_mean), np.zeros(3))
    np.testing.assert_array_equal(array(layer.moving_variance), np.ones(3))
    assert layer.skipped_batches == 0


def test_mode_2_in_a_model() -> None:
    x = drawn((12, 3))
    model = keras.Sequential([keras.Input((3,)), legacy.BatchNormalization(mode=2, epsilon=EPSILON)])
    model.compile("sgd", "mse")
    model.fit(x, x, epochs=1, verbose=0, batch_size=12)
    gamma, beta, mean, variance = model.get_weights()
    assert (gamma != 1).all()
    np.testing.assert_array_equal([mean, variance], [np.zeros(3), np.ones(3)])
    expected = textbook.train(x, gamma, beta, EPSILON).y
    np.testing.assert_allclose(model.predict(x, batch_size=12, verbose=0), expected, rtol=1e-6, atol=2e-6)


def test_mode_0_is_todays_layer() -> None:
    x = drawn((12, 3))
    old, new = legacy.BatchNormalization(1e-2, 0, -1, 0.5), BatchNormalization(epsilon=1e-2, momentum=0.5)
    np.testing.assert_array_equal(array(old(x, training=True)), array(new(x, training=True)))
    np.testing.assert_array_equal(array(old(x)), array(new(x)))


@pytest.mark.parametrize("count", [2, 4])
def test_weights(count: int) -> None:
    """[gamma, beta] or [gamma, beta, mean, variance], copied, and there before the first call."""
    given = [np.array([2.0, 3.0]), [0.5, -0.5], np.array([1.0, 2.0]), (4.0, 9.0)][:count]
    layer = BatchNormalization(weights=given, epsilon=0.0)
    given[0][:] = 99.0
    x = np.array([[3.0, 8.0]], "float32")
    mean, variance = ([1.0, 2.0], [4.0, 9.0]) if count == 4 else (0.0, 1.0)
    expected = textbook.infer(x, mean, variance, [2.0, 3.0], [0.5, -0.5], 0.0)
    np.testing.assert_allclose(array(layer(x)), expected, rtol=1e-6)


def test_weights_of_another_layer() -> None:
    """As arrays or as variables; the variables do not become weights of the second layer."""
    first = BatchNormalization(beta_initializer="ones")
    first.build((None, 3))
    for given in (first.get_weights(), first.weights):
        second = BatchNormalization(weights=given)
        second.build((None, 3))
        assert len(second.weights) == 4
        assert second.beta is not first.beta
        np.testing.assert_array_equal(array(second.beta), np.ones(3))


def test_weights_in_a_model_that_fit_builds() -> None:
    """Without an Input the layer is built inside `fit`, on some engines in a scope that forgets assignments."""
    given = [np.full(3, value) for value in (2.0, 5.0, 7.0, 9.0)]
    for layer in (legacy.BatchNormalization(weights=given, mode=2), BatchNormalization(weights=given, renorm=True)):
        model = keras.Sequential([keras.layers.Dense(3), layer])
        model.compile(keras.optimizers.SGD(0.0), "mse")
        assert not layer.built
        model.fit(np.full((2, 3), np.nan), np.zeros((2, 3)), verbose=0)  # trains no statistic
        received = {w.name: array(w)[0] for w in layer.non_trainable_weights}
        expected = {"moving_mean": 7.0, "moving_variance": 9.0}
        assert received == expected | (
            {"moving_stddev": 3.0, "renorm_mean": 7.0, "renorm_stddev": 3.0} if layer.renorm else {}
        )
    layer = BatchNormalization(weights=given[:2])
    model = keras.Sequential([keras.layers.Dense(3), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(np.ones((2, 3)), np.zeros((2, 3)), verbose=0)
    np.testing.assert_array_equal([array(layer.gamma), array(layer.beta)], given[:2])


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (
            {"weights": [np.ones(3)] * 3},
            ArgumentError,
            r"\[gamma, beta\] or \[gamma, beta, mean, variance\].*received 3 arrays",
        ),
        ({"weights": []}, ArgumentError, "received 0 arrays"),
        ({"weights": [np.ones(3)] * 2, "center": False}, ArgumentError, "received 2 arrays, scale=True, center=False"),
        (
            {"weights": [np.ones(3), np.ones(4)]},
            ShapeError,
            r"beta has one value per channel, shape \(3,\); received shape \(4,\)",
        ),
        ({"weights": [np.ones((3, 1)), np.ones(3)]}, ShapeError, r"gamma has one value.*received shape \(3, 1\)"),
    ],
)
def test_weights_that_do_not_fit(given: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        BatchNormalization(**given).build((None, 3))


def test_the_historical_signature() -> None:
    parameters = list(inspect.signature(legacy.BatchNormalization.__init__).parameters.values())[1:-1]
    assert [(p.name, p.default) for p in parameters] == [
        ("epsilon", 0.001),
        ("mode", 0),
        ("axis", -1),
        ("momentum", 0.99),
        ("weights", None),
        ("beta_init", "zero"),
        ("gamma_init", "one"),
        ("gamma_regularizer", None),
        ("beta_regularizer", None),
    ]
    layer = legacy.BatchNormalization(1e-5, 2, 1, 0.9, None, "one", "zero", "l1", legacy.l2(0.5), name="old")
    config = layer.get_config()
    chosen = ("epsilon", "mode", "axis", "momentum", "name")
    assert tuple(config[key] for key in chosen) == (1e-5, 2, 1, 0.9, "old")
    assert isinstance(layer.beta_initializer, keras.initializers.Ones)
    assert isinstance(layer.gamma_initializer, keras.initializers.Zeros)
    assert (float(layer.gamma_regularizer.l1), float(layer.beta_regularizer.l2)) == pytest.approx((0.01, 0.5))


def test_a_config_that_keras_1_wrote() -> None:
    """The keys of Keras 1.2.2's get_config, a first layer's included."""
    config = {
        "name": "batchnormalization_1",
        "trainable": True,
        "batch_input_shape": [None, 8],
        "input_dtype": "float32",
        "epsilon": 1e-06,
        "mode": 1,
        "axis": -1,
        "momentum": 0.9,
        "gamma_regularizer": {"name": "WeightRegularizer", "l1": 0.0, "l2": 0.25},
        "beta_regularizer": None,
    }
    for layer_class in (BatchNormalization, legacy.BatchNormalization):
        with pytest.warns(UserWarning, match="input_shape"):
            layer = layer_class.from_config(dict(config))
        model = keras.Sequential([layer])
        assert model.input_shape == (None, 8)
        assert (layer.epsilon, layer.mode, layer.momentum) == (1e-6, 1, 0.9)
        assert float(array(layer.losses[0])) == pytest.approx(0.25 * 8)


@pytest.mark.parametrize(
    "given",
    [
        {"input_shape": (4, 3)},
        {"batch_input_shape": (None, 4, 3)},
        {"batch_input_shape": (16, 4, 3), "input_dtype": "float32"},
    ],
)
@pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`")
def test_input_shape_of_a_first_layer(given: dict) -> None:
    model = keras.Sequential([legacy.BatchNormalization(**given), keras.layers.Flatten(), keras.layers.Dense(2)])
    assert model.built
    assert model.input_shape == (None, 4, 3)
    assert model.predict(np.ones((5, 4, 3)), verbose=0).shape == (5, 2)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_saved_cloned_and_loaded(mode: int, tmp_path: Path) -> None:
    layer = legacy.BatchNormalization(EPSILON, mode, beta_init="normal", gamma_regularizer=legacy.l1l2(0.1, 0.2))
    model = keras.Sequential([keras.Input((3,)), layer])
    x = drawn((12, 3))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for other in (loaded, clone):
        assert type(other.layers[0]) is legacy.BatchNormalization
        assert other.layers[0].get_config() == layer.get_config()
        np.testing.assert_array_equal(other.predict(x, verbose=0), model.predict(x, verbose=0))
