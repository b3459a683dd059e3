"""Short ways to write configurations as Keras 1.2 wrote them, and to compare a migrated model with the old formulas."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from evennorm.tools.migrate import Migration, migrate
from tests.migration.keras1 import Keras1

NO_WEIGHT_DECAY = dict.fromkeys(("W_regularizer", "b_regularizer", "activity_regularizer", "W_constraint", "b_constraint"))
KERNEL = {"init": "glorot_uniform", "activation": "linear", "bias": True, "trainable": True, **NO_WEIGHT_DECAY}
RECURRENT = {
    "return_sequences": False, "go_backwards": False, "stateful": False, "unroll": False, "consume_less": "cpu",
    "init": "glorot_uniform", "inner_init": "orthogonal", "activation": "tanh", "inner_activation": "hard_sigmoid",
    "W_regularizer": None, "U_regularizer": None, "b_regularizer": None, "dropout_W": 0.0, "dropout_U": 0.0,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "Dense": KERNEL | {"input_dim": None},
    "TimeDistributedDense": KERNEL | {"input_dim": None, "input_length": None},
    "Convolution1D": KERNEL | {"border_mode": "valid", "subsample_length": 1, "input_dim": None, "input_length": None},
    "AtrousConvolution1D": KERNEL | {"border_mode": "valid", "subsample_length": 1, "atrous_rate": 1},
    **{
        kind: KERNEL | {"border_mode": "valid", "subsample": [1, 1], "dim_ordering": "tf"}
        for kind in ("Convolution2D", "AtrousConvolution2D", "Deconvolution2D", "LocallyConnected2D")
    },
    "SeparableConvolution2D": KERNEL
    | {"border_mode": "valid", "subsample": [1, 1], "dim_ordering": "tf", "depth_multiplier": 1},
    "Convolution3D": KERNEL | {"border_mode": "valid", "subsample": [1, 1, 1], "dim_ordering": "tf"},
    "LocallyConnected1D": KERNEL | {"border_mode": "valid", "subsample_length": 1},
    **{f"{kind}Pooling1D": {"stride": None, "border_mode": "valid"} for kind in ("Max", "Average")},
    **{
        f"{kind}Pooling{d}D": {"strides": None, "border_mode": "valid", "dim_ordering": "tf"}
        for kind in ("Max", "Average")
        for d in (2, 3)
    },
    "BatchNormalization": {"epsilon": 1e-3, "mode": 0, "axis": -1, "momentum": 0.99}
    | {"gamma_regularizer": None, "beta_regularizer": None},
    "LSTM": RECURRENT | {"forget_bias_init": "one"},
    "GRU": RECURRENT,
    "SimpleRNN": {key: value for key, value in RECURRENT.items() if key != "inner_activation"},
    "Highway": KERNEL | {"input_dim": None},
    "MaxoutDense": KERNEL | {"nb_feature": 4, "input_dim": None},
    "Merge": {"concat_axis": -1, "dot_axes": -1, "mode_type": "raw", "output_shape": None, "output_shape_type": "raw"}
    | {"output_mask": None, "output_mask_type": "raw", "arguments": {}},
    "Embedding": {"init": "uniform", "input_length": None, "mask_zero": False, "dropout": 0.0}
    | {"W_regularizer": None, "activity_regularizer": None, "W_constraint": None},
    "Bidirectional": {"merge_mode": "concat"},
}


def layer(kind: str, name: str | None = None, **config: Any) -> dict[str, Any]:
    """One entry of a model's configuration."""
    name = name or f"{kind.lower()}_1"
    return {"class_name": kind, "config": {"name": name, "trainable": True, **DEFAULTS.get(kind, {}), **config}}


def sequential(shape: tuple[int, ...], *layers: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """A Sequential model on inputs of this shape, which has no batch axis."""
    first, *rest = layers
    given = {"batch_input_shape": [None, *shape], "input_dtype": dtype}
    return {"class_name": "Sequential", "config": [{**first, "config": {**first["config"], **given}}, *rest]}


def functional(inputs: dict[str, tuple[int, ...]], calls: list[tuple[Any, ...]], outputs: list[str]) -> dict[str, Any]:
    """A Model: `calls` holds (layer, name of input or (name, node), ...) in order; a layer may be called again."""
    entries: dict[str, dict[str, Any]] = {}
    for name, shape in inputs.items():
        entry = layer("InputLayer", name, batch_input_shape=[None, *shape], input_dtype="float32", sparse=False)
        entries[name] = {"name": name, **entry, "inbound_nodes": []}
    for made, *sources in calls:
        name = made.get("name") or made["config"]["name"]
        node = [[*(x if isinstance(x, tuple) else (x, 0)), 0] for x in sources]
        entries.setdefault(name, {"name": name, **made, "inbound_nodes": []})["inbound_nodes"].append(node)
    config = {"name": "model_1", "layers": list(entries.values())}
    config["input_layers"] = [[name, 0, 0] for name in inputs]
    config["output_layers"] = [[*(x if isinstance(x, tuple) else (x, 0)), 0] for x in outputs]
    return {"class_name": "Model", "config": config}


def difference(old: Keras1, model: dict[str, Any], tmp_path: Any, *inputs: np.ndarray, **options: Any) -> float:
    """The largest between what the old model predicts and what the migrated one does, read back from its file."""
    expected, got, _ = both(old, model, tmp_path, *inputs, **options)
    for a, b in zip(expected, got, strict=True):
        assert a.shape == b.shape
    return max(float(np.abs(a - b).max()) for a, b in zip(expected, got, strict=True))


def both(
    old: Keras1, model: dict[str, Any], tmp_path: Any, *inputs: np.ndarray, **options: Any
) -> tuple[list[np.ndarray], list[np.ndarray], Migration]:
    """What the old model predicts, what the new one does, and the report."""
    expected = old.predict(model, *(np.asarray(x, np.float64) for x in inputs))
    path = old.save(tmp_path / "old.h5", model)
    report = migrate(path, tmp_path / "new.keras", **options)
    new = keras.saving.load_model(tmp_path / "new.keras")
    got = new.predict_on_batch(inputs[0] if len(inputs) == 1 else list(inputs))
    as_list = [x if isinstance(x, list) else [x] for x in (expected, got)]
    return as_list[0], [np.asarray(x, np.float64) for x in as_list[1]], report
