"""Translate one old layer to the Keras 3 layers that do the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import layers

from evennorm.errors import InputError
from evennorm.tools.migrate import convolutions, merging, normalization, pooling, recurrent, simple
from evennorm.tools.migrate.block import Block, Layout, Task

_SPATIAL: dict[str, Callable[[Task, int], Block]] = {
    **{f"Conv{d}D": convolutions.convolution for d in (1, 2, 3)},
    **{f"Conv{d}DTranspose": convolutions.transposed for d in (2, 3)},
    **{f"SeparableConv{d}D": convolutions.separable for d in (1, 2)},
    "DepthwiseConv2D": convolutions.separable,
    **{f"LocallyConnected{d}D": convolutions.locally_connected for d in (1, 2)},
    **{f"{kind}Pooling{d}D": pooling.pooling for kind in ("Max", "Average") for d in (1, 2, 3)},
    **{f"Global{kind}Pooling{d}D": pooling.global_pooling for kind in ("Max", "Average") for d in (1, 2, 3)},
    **{f"ZeroPadding{d}D": pooling.zero_padding for d in (1, 2, 3)},
    **{f"Cropping{d}D": pooling.cropping for d in (1, 2, 3)},
    **{f"UpSampling{d}D": pooling.up_sampling for d in (1, 2, 3)},
}
_KEPT: dict[str, Callable[[Task], Block]] = {
    "Dropout": simple.dropout,
    "GaussianDropout": simple.dropout,
    "GaussianNoise": simple.gaussian_noise,
    "LeakyReLU": simple.leaky_relu,
    "ELU": simple.elu,
    "ReLU": simple.relu,
    "ThresholdedReLU": simple.thresholded_relu,
    "PReLU": simple.prelu,
    "ActivityRegularization": simple.activity_regularization,
}
"""Classes that treat all elements alike, or can follow an axis that was moved."""
_MERGES: dict[str, Callable[[Task], Block]] = dict.fromkeys(
    ("Merge", "Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate", "Dot"), merging.merge
)
_PLAIN: dict[str, Callable[[Task], Block]] = {
    "Dense": simple.dense,
    "Embedding": simple.embedding,
    "Masking": simple.masking,
    "Reshape": simple.reshape,
    "Permute": simple.permute,
    "RepeatVector": simple.repeat_vector,
    "MaxoutDense": simple.maxout_dense,
    "Highway": simple.highway,
    "ParametricSoftplus": simple.parametric_softplus,
    "SReLU": simple.srelu,
    "Softmax": simple.softmax,
    "SimpleRNN": recurrent.recurrent,
    "LSTM": recurrent.recurrent,
    "GRU": recurrent.recurrent,
    "CuDNNLSTM": recurrent.recurrent,
    "CuDNNGRU": recurrent.recurrent,
}
_SAME = (
    "AlphaDropout", "Attention", "AdditiveAttention", "CategoryEncoding", "CenterCrop", "GroupNormalization",
    "LayerNormalization", "MultiHeadAttention", "Rescaling", "Resizing", "UnitNormalization",
)  # fmt: skip
"""Classes of later releases of tf.keras that Keras 3 took over unchanged."""

_OWN = (
    "BatchNormalization", "Activation", "Flatten", "InputLayer", "ConvLSTM2D", "SpatialDropout1D", "SpatialDropout2D",
    "SpatialDropout3D", "TimeDistributed", "Bidirectional",
)  # fmt: skip

KNOWN = frozenset((*_SPATIAL, *_KEPT, *_MERGES, *_PLAIN, *_SAME, *_OWN))
"""All classes that can be migrated."""


def layout(kind: str, config: Mapping[str, Any], rank: int, moved: bool) -> Layout:
    """Return the order of axes in which the layer wants its input."""
    first = config.get("data_format") == "channels_first"
    if kind in _SPATIAL or kind.startswith("SpatialDropout") or kind in ("ConvLSTM2D", "Flatten"):
        return Layout.MOVED if first and kind != "ConvLSTM2D" else Layout.PLAIN
    if kind in _KEPT:
        return Layout.KEPT
    if kind in _MERGES:
        dot = kind == "Dot" or (kind == "Merge" and config.get("mode") in ("dot", "cos"))
        return Layout.PLAIN if dot else Layout.KEPT
    if kind == "Activation":
        return Layout.PLAIN if config.get("activation") in ("softmax", "log_softmax") and rank > 2 else Layout.KEPT
    if kind == "BatchNormalization":
        plain = int(config.get("mode", 0) or 0) == 1
        return Layout.PLAIN if plain else Layout.KEPT
    return Layout.PLAIN


def translate(task: Task) -> Block:
    """Translate one layer that is no model, wrapper or input.

    Raises:
        InputError: a class that has no counterpart; arrays that do not fit.
    """
    kind = task.layer.kind
    if kind in _SPATIAL:
        return _SPATIAL[kind](task, int(kind[kind.index("D", 1) - 1] if kind == "DepthwiseConv2D" else _rank(kind)))
    for table in (_KEPT, _MERGES, _PLAIN):
        if kind in table:
            return table[kind](task)
    match kind:
        case "BatchNormalization":
            return normalization.batch_normalization(task)
        case "Activation":
            return simple.activation_layer(task)
        case "Flatten":
            return simple.flatten(task)
        case "SpatialDropout1D" | "SpatialDropout2D" | "SpatialDropout3D":
            return simple.dropout(task)
        case "ConvLSTM2D":
            return _conv_lstm(task)
    if kind in _SAME and task.origin.major > 1:
        return _same(task)
    raise InputError(f"{task.name!r} is a {task.layer.written}, which migration does not know")


def _rank(kind: str) -> int:
    return next(int(letter) for letter in reversed(kind) if letter.isdigit()) if kind[-1] == "D" else _rank(kind[:-9])


def _conv_lstm(task: Task) -> Block:
    if task.config.get("data_format") != "channels_first":
        return recurrent.conv_lstm(task)
    last = layers.Permute((1, 3, 4, 2), name=f"{task.name}_to_channels_last")
    shape = tuple(task.shape[a] for a in (0, 1, 3, 4, 2))
    block = recurrent.conv_lstm(Task(task.layer, task.arrays, (shape,), False, task.origin, task.converted, task.assumed))
    back = (1, 4, 2, 3) if task.config.get("return_sequences") else (3, 1, 2)
    return Block([last, *block.layers, layers.Permute(back, name=f"{task.name}_to_channels_first")], block.values)


def _same(task: Task) -> Block:
    """Copy a class that is the same in Keras 3: Keras itself reads its configuration, and runs no code in it."""
    foreign = ("batch_input_shape", "dtype", "input_dim", "input_length", "build_config")
    config = {key: value for key, value in task.config.items() if key not in foreign}
    try:
        layer = getattr(layers, task.layer.kind).from_config(config)
    except Exception as error:  # Keras raises whatever its constructors raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{task.name!r} of class {task.layer.written} is not set as Keras 3 can read it: {reason}"
        ) from error
    if isinstance(layer, keras.Model):
        raise InputError(f"{task.name!r} is a {task.layer.written}, which migration does not know")
    return Block([layer], [(layer, list(task.arrays))] if task.arrays else [])
