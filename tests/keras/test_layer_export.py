"""model.export, with the batch size unknown: what serves elsewhere computes what the model does here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from evennorm.keras import BatchNormalization, legacy
from tests.keras.backend import BACKEND


def model_of(name: str) -> keras.Model:
    inputs = keras.Input((6, 6, 4))
    if name == "network":
        x = BatchNormalization()(inputs)
        x = keras.layers.Conv2D(4, 3, padding="same")(x)
        x = BatchNormalization(activation="relu")(x, residual=inputs)
        x = BatchNormalization(axis=1, scale=False)(x)
        x = BatchNormalization(axis=(1, 3), activation="gelu")(x)
    else:
        x = legacy.BatchNormalization(mode=1)(inputs)
        x = legacy.BatchNormalization(mode=2)(x)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    rng = np.random.default_rng(40)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
    return model


def exported(model: keras.Model, folder: Path) -> Any:
    """A function on arrays that has nothing of Keras."""
    if BACKEND == "torch":
        import torch

        sizes = {0: torch.export.Dim("batch")}  # without it Keras's export on torch fixes the batch to 1
        model.export(folder / "model.pt2", format="torch", verbose=False, dynamic_shapes=sizes)
        module = torch.export.load(folder / "model.pt2").module()
        device = keras.ops.convert_to_tensor(0.0).device
        return lambda x: module(torch.tensor(x, device=device)).detach().cpu().numpy()
    import tensorflow as tf

    model.export(folder / "model", format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(folder / "model")

    def served(x: np.ndarray) -> np.ndarray:
        return loaded.serve(x).numpy()  # holds on to `loaded`, whose variables die with it

    return served


@pytest.mark.filterwarnings("ignore")  # the exporters' own, about each other
@pytest.mark.parametrize("name", ["network", "modes of Keras 1"])
def test_export(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    serve = exported(model, tmp_path)
    for batch in (2, 7):
        x = np.random.default_rng(batch).normal(3.0, 1.0, (batch, 6, 6, 4)).astype("float32")
        # Of values up to 160: what is served is the composed form, and another kernel may have predicted.
        np.testing.assert_allclose(serve(x), model.predict(x, verbose=0), rtol=1e-6, atol=2e-6)
