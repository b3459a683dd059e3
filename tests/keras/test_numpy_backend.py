"""Inference on Keras's NumPy backend, which cannot train: values, modes, models and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from evennorm.errors import ArgumentError
from evennorm.keras import BatchNormalization, legacy
from evennorm.kernels import choose
from tests.keras import textbook

RNG = np.random.default_rng(60)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize(("shape", "axis"), [((8, 3), -1), ((4, 3, 5, 5), 1), ((4, 5, 3), (1, 2)), ((4, 3, 5, 2), (1, 3))])
def test_inference(shape: tuple[int, ...], axis: Any, mean: float) -> None:
    size = textbook.parameter_shape(shape, axis)
    layer = BatchNormalization(axis=axis)
    layer.build(shape)
    gamma, beta, variance = (RNG.uniform(0.5, 2.0, size).astype("float32") for _ in range(3))
    layer.set_weights([gamma, beta, np.full(size, mean, "float32"), variance])
    x = RNG.normal(mean, 1.0, shape).astype("float32")
    expected = textbook.infer(x, mean * np.ones(size), variance, gamma, beta, axis=axis)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-6, atol=2e-6)


def test_there_is_nothing_to_synchronize() -> None:
    with pytest.raises(ArgumentError) as refused:
        BatchNormalization(synchronized=True)
    assert str(refused.value) == (
        "synchronized=True takes the statistics of all devices together on the Keras backends jax, torch, tensorflow; "
        "received the backend 'numpy'; choose another by KERAS_BACKEND, or leave out synchronized"
    )


def test_training_values_and_statistics() -> None:
    """The backend has no gradients, but a call in training does what it does elsewhere."""
    layer = BatchNormalization(momentum=0.5, activation="relu")
    x = RNG.normal(1e5, 1.0, (32, 4, 3)).astype("float32")
    expected = textbook.train(x)
    np.testing.assert_allclose(layer(x, training=True), np.maximum(expected.y, 0), rtol=0, atol=2e-6)
    np.testing.assert_allclose(layer.moving_mean.numpy(), 0.5 * expected.mean, rtol=1e-7)
    np.testing.assert_allclose(layer.moving_variance.numpy(), 0.5 + 0.5 * expected.variance, rtol=1e-6)


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16"])
def test_precisions(policy: str) -> None:
    x = keras.ops.cast(RNG.normal(10.0, 1.0, (16, 3)), policy.removeprefix("mixed_"))
    layer = BatchNormalization(dtype=policy)
    layer.build(x.shape)
    layer.set_weights(layer.get_weights())  # Keras's NumPy backend holds initial float64 values as float32
    y = layer(x)
    roundoff = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 1e-15}[policy.removeprefix("mixed_")]
    assert keras.backend.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
    np.testing.assert_allclose(
        np.asarray(y, "float64"), textbook.infer(np.asarray(x, "float64"), 0.0, 1.0), rtol=1.01 * roundoff
    )


def test_modes_of_keras_1() -> None:
    x = RNG.normal(3.0, 2.0, (6, 4)).astype("float32")
    wide = x.astype("float64")
    deviation = np.sqrt(wide.var(-1, keepdims=True) + 0.25) + 0.25
    expected = (wide - wide.mean(-1, keepdims=True)) / deviation
    np.testing.assert_allclose(legacy.BatchNormalization(0.25, 1)(x), expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(legacy.BatchNormalization(0.25, 2)(x), textbook.train(x, epsilon=0.25).y, rtol=0, atol=2e-6)


def test_model_predicts_and_is_saved(tmp_path: Path) -> None:
    model = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            BatchNormalization(activation="relu"),
            keras.layers.Conv2D(4, 3),
            BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    x = RNG.normal(size=(5, 6, 7, 3)).astype("float32")
    y = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), y)
    theirs = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    theirs.set_weights(model.get_weights())
    np.testing.assert_allclose(theirs.predict(x, verbose=0), y, rtol=0, atol=2e-6)


def test_repr_names_the_engine() -> None:
    kernel = choose("numpy", "float32")
    assert (
        repr(BatchNormalization(name="here"))
        == f"<BatchNormalization name=here, axis=-1, built=False, kernel={kernel} on numpy>"
    )


def test_a_backend_without_a_framework_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "openvino")
    with pytest.raises(ValueError, match="runs on the Keras backends jax, torch, tensorflow, numpy; received 'openvino'"):
        BatchNormalization().build((None, 3))
