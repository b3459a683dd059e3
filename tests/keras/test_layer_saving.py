"""Files: each kind, written with either layer, loads into the other; what is saved predicts bit for bit as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from evennorm.keras import BatchNormalization
from tests.keras.backend import array

X = np.random.default_rng(30).normal(2.0, 3.0, (10, 5, 3)).astype("float32")
LAYERS = {"ours": BatchNormalization, "Keras's": keras.layers.BatchNormalization}


def build(normalization: Any, **given: Any) -> keras.Model:
    """Two layers, one of them nested in a model, with weights that no initializer draws."""
    inner = keras.Sequential([keras.Input((5, 4)), normalization(scale=False), keras.layers.Flatten()], name="inner")
    model = keras.Sequential(
        [keras.Input((5, 3)), normalization(axis=1, **given), keras.layers.Dense(4), inner, keras.layers.Dense(2)],
        name="outer",
    )
    model.layers[0].moving_mean.assign(np.arange(5))
    inner.layers[0].moving_variance.assign(np.arange(1, 5))
    return model


def randomized(model: keras.Model) -> keras.Model:
    rng = np.random.default_rng(31)
    model.set_weights([rng.uniform(0.5, 2.0, w.shape) for w in model.get_weights()])
    return model


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".weights.h5"])
@pytest.mark.parametrize(("writer", "reader"), [("ours", "Keras's"), ("Keras's", "ours"), ("ours", "ours")])
@pytest.mark.parametrize("renorm", [False, True])
def test_weights_load_into_the_other_layer(suffix: str, writer: str, reader: str, renorm: bool, tmp_path: Path) -> None:
    saved, loaded = randomized(build(LAYERS[writer], renorm=renorm)), build(LAYERS[reader], renorm=renorm)
    path = tmp_path / f"model{suffix}"
    saved.save_weights(path) if suffix == ".weights.h5" else saved.save(path)
    loaded.load_weights(path)
    for before, after in zip(saved.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(array(loaded(X)), array(saved(X)), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_whole_models_load_by_themselves(suffix: str, tmp_path: Path) -> None:
    """After training, with arguments that only our layer has; loading executes no code from the file."""
    given = {"activation": "relu6", "virtual_batch_size": 2, "momentum": None, "unbiased_variance": True}
    model = build(BatchNormalization, **given)
    model.compile("sgd", keras.losses.MeanSquaredError())  # not "mse", which Keras cannot read back from .h5
    model.fit(X[:8], np.zeros((8, 2)), epochs=2, batch_size=4, verbose=0)
    model.save(tmp_path / f"model{suffix}")
    loaded = keras.models.load_model(tmp_path / f"model{suffix}")
    assert type(loaded.layers[0]) is BatchNormalization
    assert loaded.layers[0].get_config() == model.layers[0].get_config()
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    # Training goes on where it stopped; compiled anew, as Keras loses the optimizer's variables in .h5 files of any layer.
    for each in (model, loaded):
        each.compile("sgd", "mse")
        each.fit(X[:8], np.zeros((8, 2)), epochs=1, batch_size=4, shuffle=False, verbose=0)
    for before, after in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-6, atol=1e-7)
    assert int(array(loaded.layers[0].num_batches)) == 6


def test_files_hold_weights_only(tmp_path: Path) -> None:
    """What the layer keeps beside its weights, the count of skipped batches among it, is no part of any file."""
    import h5py

    layer = BatchNormalization()
    model = keras.Sequential([keras.Input((3,)), layer])
    layer(np.full((2, 3), np.nan, "float32"), training=True)
    assert layer.skipped_batches == 1
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        variables = file["layers/batch_normalization/vars"]
        assert sorted(variables) == ["0", "1", "2", "3"]
    loaded = keras.Sequential([keras.Input((3,)), BatchNormalization()])
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert loaded.layers[0].skipped_batches == 0


def test_after_many_steps_predictions_are_bit_identical(tmp_path: Path) -> None:
    """The part of the moving mean below float32 is not saved, and inference does not read it."""
    layer = BatchNormalization(momentum=0.99)
    model = keras.Sequential([keras.Input((3,)), layer])
    for seed in range(30):
        layer(np.random.default_rng(seed).normal(1e5, 1.0, (16, 3)).astype("float32"), training=True)
    x = np.random.default_rng(99).normal(3e4, 1.0, (16, 3)).astype("float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
