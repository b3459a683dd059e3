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


CONVOLUTIONS = {
    "Keras's": lambda: [keras.layers.BatchNormalization(), keras.layers.ReLU()],
    "ours": lambda: [BatchNormalization(), keras.layers.ReLU()],
    "ours with its activation": lambda: [BatchNormalization(activation="relu")],
    "the old name": lambda: [legacy.BatchNormalization(), keras.layers.ReLU()],
}


def convolutions(kind: str) -> keras.Model:
    """Three times convolution, normalization, relu, then the average: four operations for a device."""
    x = inputs = keras.Input((8, 8, 3))
    for filters in (4, 8, 8):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        for layer in CONVOLUTIONS[kind]():
            x = layer(x)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    rng = np.random.default_rng(41)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) * (0.1 if w.ndim == 4 else 1.0) for w in model.get_weights()])
    return model


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TFLite reads models of TensorFlow")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["float", "int8"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_tflite_has_nothing_left_of_the_normalization(kind: str, precision: str) -> None:
    import tensorflow as tf

    model, rng = convolutions(kind), np.random.default_rng(42)
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if precision == "int8":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([rng.normal(size=(1, 8, 8, 3)).astype("float32")] for _ in range(4))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    found = [operation["op_name"] for operation in interpreter._get_ops_details()]
    plain = ["CONV_2D", "CONV_2D", "CONV_2D", "MEAN"]
    assert found == (plain if precision == "float" else ["QUANTIZE", *plain, "DEQUANTIZE"])
    interpreter.allocate_tensors()
    x = rng.normal(size=(1, 8, 8, 3)).astype("float32")
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    served, here = interpreter.get_tensor(interpreter.get_output_details()[0]["index"]), model.predict(x, verbose=0)
    assert np.abs(served - here).max() < (1e-5 if precision == "float" else 0.05) * np.abs(here).max()


@pytest.mark.skipif(BACKEND != "torch", reason="what Keras exports to ONNX from torch")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_onnx_asks_for_no_sizes(kind: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    model = convolutions(kind)
    x = np.random.default_rng(43).normal(size=(3, 8, 8, 3)).astype("float32")
    expected = model.predict(x, verbose=0)
    model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    found = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not found & {"Shape", "Gather", "Reshape", "Where", "Concat"}, found
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (served,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-6)
