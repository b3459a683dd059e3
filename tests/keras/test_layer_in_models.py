"""The layer inside models: every kind of model, shared, frozen, compiled or not, beside a model of Keras's own layer."""

from __future__ import annotations

import copy
from typing import Any

import keras
import numpy as np
import pytest

from evennorm.keras import BatchNormalization
from tests.keras import textbook
from tests.keras.backend import BACKEND, array, state

X = np.random.default_rng(20).normal(1.0, 2.0, (48, 6, 6, 3)).astype("float32")
Y = np.random.default_rng(21).integers(0, 4, 48)


def sequential(normalization: type[keras.layers.Layer]) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            normalization(momentum=0.9),
            keras.layers.Flatten(),
            normalization(momentum=0.9, center=False),
            keras.layers.Dense(4),
        ]
    )


def functional(normalization: type[keras.layers.Layer]) -> keras.Model:
    inputs = keras.Input((None, None, 3))
    x = normalization(momentum=0.9)(inputs)
    x = keras.layers.Conv2D(4, 3, use_bias=False)(x)
    x = keras.layers.Activation("relu")(normalization(momentum=0.9)(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(4)(x))


class Subclassed(keras.Model):
    def __init__(self, normalization: type[keras.layers.Layer]):
        super().__init__()
        self.convolution = keras.layers.Conv2D(4, 3)
        self.normalization = normalization(momentum=0.9)
        self.blocks = [normalization(momentum=0.9), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)]

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x = self.normalization(self.convolution(inputs), training=training)
        for block in self.blocks:
            x = block(x)  # training comes from the context
        return x


def pair(build: Any) -> tuple[keras.Model, keras.Model]:
    """The same model of our layer and of Keras's, with the same initial weights."""
    models = build(BatchNormalization), build(keras.layers.BatchNormalization)
    for model in models:
        loss = keras.losses.SparseCategoricalCrossentropy(True)
        model.compile(keras.optimizers.SGD(0.02), loss, metrics=["accuracy"])
        model(X[:1])
    models[0].set_weights(models[1].get_weights())
    return models


@pytest.mark.parametrize("build", [sequential, functional, Subclassed])
def test_trains_as_with_keras_layer(build: Any) -> None:
    ours, theirs = pair(build)
    losses = [model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0).history["loss"] for model in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=2e-5)
    for mine, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=5e-5)


def test_evaluates_and_predicts_as_with_keras_layer() -> None:
    ours, theirs = pair(sequential)
    rng = np.random.default_rng(22)
    ours.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in ours.get_weights()])
    theirs.set_weights(ours.get_weights())
    np.testing.assert_allclose(ours.evaluate(X, Y, verbose=0), theirs.evaluate(X, Y, verbose=0), rtol=1e-5)
    np.testing.assert_allclose(ours.predict(X, verbose=0), theirs.predict(X, verbose=0), rtol=1e-5)


def test_counts_its_weights_as_keras_layer() -> None:
    ours, theirs = sequential(BatchNormalization), sequential(keras.layers.BatchNormalization)
    assert [(w.name, w.shape) for w in ours.weights] == [(w.name, w.shape) for w in theirs.weights]
    assert ours.count_params() == theirs.count_params()
    for attribute in ("weights", "trainable_weights", "non_trainable_weights", "trainable_variables"):
        assert len(getattr(ours, attribute)) == len(getattr(theirs, attribute))


@pytest.mark.parametrize(
    "how", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": BACKEND != "torch"}], ids=str
)
def test_compiled_or_not(how: dict[str, bool]) -> None:
    """One step's loss and weights. torch.compile is tried in the engines' contract, where it need not compile Keras."""
    x = X[:16, 0, 0]
    layer = BatchNormalization(momentum=0.5, gamma_initializer=keras.initializers.Constant(2.0))
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(keras.optimizers.SGD(1.0), "mse", **how)
    loss = model.train_on_batch(x, np.zeros_like(x))
    expected = textbook.train(x, gamma=2.0)
    assert float(loss) == pytest.approx(np.mean(expected.y**2), rel=1e-5)
    np.testing.assert_allclose(array(layer.moving_mean), 0.5 * expected.mean, rtol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), 0.5 + 0.5 * expected.variance, rtol=1e-6)
    _, d_gamma, d_beta = textbook.gradients(x, np.full(3, 2.0), 2 * expected.y / expected.y.size)
    np.testing.assert_allclose(array(layer.gamma), 2.0 - d_gamma, rtol=1e-5)
    np.testing.assert_allclose(array(layer.beta), -d_beta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy: str) -> None:
    """The global policy, in fit: inputs are rounded to half precision, all else is as exact as ever."""
    keras.config.set_dtype_policy(policy)
    try:
        layer = BatchNormalization(momentum=0.5)
        model = keras.Sequential([keras.Input((3,)), layer])
    finally:
        keras.config.set_dtype_policy("float32")
    half = policy.removeprefix("mixed_")
    assert (layer.compute_dtype, layer.moving_mean.dtype) == (half, "float32")
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x = X[:16, 0, 0]
    model.fit(x, np.zeros_like(x), batch_size=16, verbose=0)
    expected = textbook.train(array(keras.ops.cast(x, half)))
    np.testing.assert_allclose(array(layer.moving_mean), 0.5 * expected.mean, rtol=1e-6)
    np.testing.assert_allclose(array(layer.moving_variance), 0.5 + 0.5 * expected.variance, rtol=1e-6)
    assert layer.skipped_batches == 0


def test_shared_across_inputs() -> None:
    """Each call normalizes by its own batch and moves the one set of statistics, in the order in which Keras calls."""
    a, b = X[:8, 0, 0], X[8:16, 0, 0] + 5
    statistics = []
    for layer in (BatchNormalization(momentum=0.5), keras.layers.BatchNormalization(momentum=0.5)):
        left, right = keras.Input((3,)), keras.Input((3,))
        model = keras.Model([left, right], [layer(left), layer(right)])
        model.compile(keras.optimizers.SGD(0.0), ["mse", "mse"])
        zeros = np.zeros_like(a)
        losses = model.train_on_batch([a, b], [zeros, zeros])
        assert float(losses[0]) == pytest.approx(np.mean(textbook.train(a).y ** 2 + textbook.train(b).y ** 2), rel=1e-5)
        assert len(model.weights) == 4
        statistics.append((array(layer.moving_mean), array(layer.moving_variance)))
    np.testing.assert_allclose(*statistics, rtol=2e-5)
    first, second = (b, a) if statistics[0][0][0] < 2.5 else (a, b)
    expected = 0.25 * textbook.train(first).mean + 0.5 * textbook.train(second).mean
    np.testing.assert_allclose(statistics[0][0], expected, rtol=1e-6)


def test_frozen_is_inference_and_thaws() -> None:
    layer = BatchNormalization(momentum=0.5, moving_mean_initializer="ones")
    x = X[:, 0, 0]
    trained = layer(x, training=True)
    before = state(layer)
    layer.trainable = False
    np.testing.assert_array_equal(array(layer(x, training=True)), array(layer(x)))
    for old, new in zip(before, state(layer), strict=True):
        np.testing.assert_array_equal(old, new)
    assert layer.trainable_variables == []
    layer.trainable = True
    np.testing.assert_array_equal(array(layer(x, training=True)), array(trained))
    assert (state(layer)[2] != before[2]).all()


def test_frozen_in_fit() -> None:
    """Frozen before compile, the layer keeps all of its weights; thawed and compiled anew, it trains."""
    frozen, free = BatchNormalization(name="frozen"), BatchNormalization(name="free")
    model = keras.Sequential([keras.Input((3,)), frozen, keras.layers.Dense(3), free])
    x = X[:16, 0, 0]
    frozen.trainable = False
    for thawed in (False, True):
        frozen.trainable = thawed
        model.compile("sgd", "mse")
        before = state(frozen), state(free)
        model.fit(x, x**2, batch_size=16, verbose=0)
        assert [(old != new).any() for old, new in zip(before[0], state(frozen), strict=True)] == [thawed] * 4
        assert [(old != new).any() for old, new in zip(before[1], state(free), strict=True)] == [True] * 4


def small() -> keras.Model:
    layers = [keras.Input((None, 3)), BatchNormalization(activation="relu"), keras.layers.Dense(4), BatchNormalization()]
    return keras.Sequential(layers)


def test_cloned_and_copied() -> None:
    model = small()
    model.layers[2].moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    clone = keras.models.clone_model(model)
    assert [type(layer) for layer in clone.layers] == [type(layer) for layer in model.layers]
    assert clone.layers[0].get_config() == model.layers[0].get_config()
    assert clone.layers[0] is not model.layers[0]
    clone.set_weights(model.get_weights())
    copied = copy.deepcopy(model)
    x = X[:4, 0]
    np.testing.assert_array_equal(array(clone(x)), array(model(x)))
    np.testing.assert_array_equal(array(copied(x)), array(model(x)))
    copied.layers[2].moving_mean.assign(np.zeros(4))
    np.testing.assert_array_equal(array(model.layers[2].moving_mean), [1, 2, 3, 4])


def test_a_batch_of_any_size_predicts_the_same() -> None:
    model, x = small(), X[:, 0]
    whole = model.predict(x, batch_size=48, verbose=0)
    np.testing.assert_allclose(model.predict(x, batch_size=25, verbose=0), whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(array(model(x[:1])), whole[:1], rtol=0, atol=1e-6)


def test_inside_layers_that_call_it_on_parts() -> None:
    """keras.layers.TimeDistributed calls the layer on flattened time steps."""
    inner = BatchNormalization(momentum=0.0)
    model = keras.Sequential([keras.Input((4, 3)), keras.layers.TimeDistributed(inner)])
    model.compile("sgd", "mse")
    x = X[:8, 0, :4]
    model.train_on_batch(x, x)
    assert np.isfinite(array(inner.moving_mean)).all()
    assert model.predict(x, verbose=0).shape == x.shape


def test_adapts_to_statistics_reset_by_hand() -> None:
    """Assigning a moving mean is all it takes to start anew: nothing of the old one is left."""
    layer = BatchNormalization(momentum=0.5)
    x = np.full((4, 3), 1e5, "float32") + np.arange(4, dtype="float32")[:, None] / 8
    for _ in range(5):
        layer(x, training=True)
    layer.moving_mean.assign(np.zeros(3))
    layer.moving_variance.assign(np.ones(3))
    small = X[:8, 0, 0]
    layer(small, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), 0.5 * textbook.train(small).mean, rtol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="of torch's extension")
def test_on_torch_the_extension_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Python between the layer and its kernel."""
    from evennorm.torch import native
    from tests.torch.native_calls import watched

    if not native.AVAILABLE:
        pytest.skip("built without the extension for this torch")
    served = watched(monkeypatch, "batch_norm")
    layer = BatchNormalization(activation="relu")
    for size in (8, 9):
        layer(keras.random.normal((size, 4)), training=True)
    assert served == [True, True]
