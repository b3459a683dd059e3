"""Translate old recurrent layers to Keras 3's, with one kernel for all gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from keras import layers

from evennorm.errors import InputError
from evennorm.keras import legacy
from evennorm.tools.migrate.arguments import SLOPE, activation
from evennorm.tools.migrate.block import Block, Task, tuple_of
from evennorm.tools.migrate.convolutions import flipped
from evennorm.tools.migrate.provenance import Provenance

_FLAGS = ("return_sequences", "return_state", "go_backwards", "stateful", "unroll", "zero_output_for_mask")
_GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1, "ConvLSTM2D": 4}
_SCALED = {"LSTM": (0, 1, 3), "ConvLSTM2D": (0, 1, 3), "GRU": (0, 1)}
"""The gates that go through the recurrent activation, among i, f, c, o and z, r, h."""
_CLASSES = {"CuDNNLSTM": "LSTM", "CuDNNGRU": "GRU"}


def recurrent(task: Task) -> Block:
    """Translate SimpleRNN, GRU, LSTM and their CuDNN forms."""
    layer = build(task)
    return Block([layer], [(layer, arrays_of(task, task.arrays))])


def bidirectional(task: Task, inner: Task, masked: bool) -> Block:
    """Translate Bidirectional: its arrays are those of the forward layer, then those of the backward one.

    Args:
        masked: whether its input comes with a mask.
    """
    half = len(task.arrays) // 2
    if len(task.arrays) % 2:
        raise InputError(f"{task.name!r} has two layers alike, and the file {len(task.arrays)} weights; it is damaged")
    repeats = masked and bool(inner.config.get("return_sequences")) and _repeats_at_masked_steps(task.origin)
    if repeats:
        task.converted.append(
            "became evennorm.keras.legacy.Bidirectional: masked steps repeat the output before them, Keras 3's are zero"
        )
    class_ = legacy.Bidirectional if repeats else layers.Bidirectional
    other = _turned(inner) if inner.config.get("go_backwards") else None
    wrapped = class_(build(inner), merge_mode=task.config.get("merge_mode", "concat"), backward_layer=other, **task.base)
    values = [array for part in (task.arrays[:half], task.arrays[half:]) for array in arrays_of(inner, part)]
    task.converted.extend(dict.fromkeys(inner.converted))
    task.assumed.extend(dict.fromkeys(inner.assumed))
    return Block([wrapped], [(wrapped, values)])


def _turned(inner: Task) -> Any:
    """Return the other direction of a layer that runs backwards: Keras 3 reverses only layers that run forwards."""
    name = f"backward_{inner.name}"
    return build(replace(inner, layer=replace(inner.layer, name=name, config={**inner.config, "go_backwards": False})))


def _repeats_at_masked_steps(origin: Provenance) -> bool:
    """Return whether outputs repeat at masked steps: up to Keras 2.3.1 and TensorFlow 1.12. tf.keras gives zeros since, as
    Keras 3."""
    if origin.said and origin.said.endswith("-tf"):
        return origin.releases[-1] < (2, 2, 0)
    return origin.releases[-1] < (2, 4, 0)


def build(task: Task) -> Any:
    """Build the Keras 3 layer, without its weights."""
    config = task.config
    kind = _CLASSES.get(task.layer.kind, task.layer.kind)
    options: dict[str, Any] = {
        "units": int(config["units"]),
        "activation": _own_activation(task, config.get("activation", "tanh")),
        "use_bias": bool(config.get("use_bias", True)),
        "dropout": float(config.get("dropout") or 0),
        "recurrent_dropout": float(config.get("recurrent_dropout") or 0),
        **{key: bool(config[key]) for key in _FLAGS if key in config},
        **task.arguments.common(config, "kernel", "recurrent", "bias"),
        **task.base,
    }
    if kind != "SimpleRNN":
        options["recurrent_activation"] = _gate_activation(task)
    if kind == "GRU":
        options["reset_after"] = task.layer.kind == "CuDNNGRU" or bool(config.get("reset_after", False))
    return getattr(layers, kind)(**options)


def _gate_activation(task: Task) -> str:
    default = "sigmoid" if task.layer.kind.startswith("CuDNN") else "hard_sigmoid"
    return activation(task.config.get("recurrent_activation", default), task.name)


def _own_activation(task: Task, value: Any) -> Any:
    name = activation(value, task.name)
    if name != "hard_sigmoid":
        return name
    task.converted.append("activation evennorm.keras.legacy.hard_sigmoid: it acts on the state, which no weight scales")
    return legacy.hard_sigmoid


def arrays_of(task: Task, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return kernel, recurrent kernel and bias, gates side by side in Keras 3's order.

    Raises:
        InputError: a number or a shape of arrays that the layer never had.
    """
    kind = _CLASSES.get(task.layer.kind, task.layer.kind)
    gates = _GATES[kind]
    if len(arrays) == 3 * gates and gates > 1:
        order = (0, 2, 1, 3) if gates == 4 else (0, 1, 2)  # i, c, f, o were stored
        found = [np.concatenate([arrays[3 * gate + part] for gate in order], axis=_out(arrays[part])) for part in range(3)]
        task.converted.append(f"{len(arrays)} weights, some for each gate, put side by side")
    elif len(arrays) in (2, 3):
        found = [np.asarray(array) for array in arrays]
    else:
        raise InputError(
            f"a {task.layer.written} stores 3{f' or {3 * gates}' if gates > 1 else ''} weights; the file has {len(arrays)} "
            f"for {task.name!r}; it is damaged, or the architecture is another"
        )
    if task.layer.kind.startswith("CuDNN"):
        found = _from_cudnn(task, found, gates)
    if kind != "SimpleRNN" and _gate_activation(task) == "hard_sigmoid":
        task.converted.append("weights of the gates times 1.2: hard_sigmoid had the slope 0.2 and has 1/6 in Keras 3")
        found = [_scaled(array, gates, _SCALED[kind]) for array in found]
    return found


def _out(array: np.ndarray) -> int:
    """Return the axis of the units; in channels-first models ConvLSTM2D has it first."""
    return -1 if array.ndim < 4 else 3


def _scaled(array: np.ndarray, gates: int, which: tuple[int, ...]) -> np.ndarray:
    units = array.shape[-1] // gates
    wide = np.array(array, np.float64).reshape(*array.shape[:-1], gates, units)
    wide[..., list(which), :] *= SLOPE
    return wide.reshape(array.shape)


def _from_cudnn(task: Task, found: list[np.ndarray], gates: int) -> list[np.ndarray]:
    """Convert arrays of CuDNN layers, which transpose kernels and have a bias on the input and on the state."""
    task.converted.append("CuDNN's weights put in the order of the layer that runs everywhere")
    kernel = np.concatenate([x.T.reshape(x.shape, order="F") for x in np.split(found[0], gates, axis=1)], axis=1)
    inner = np.concatenate([x.T for x in np.split(found[1], gates, axis=1)], axis=1)
    bias = found[2].reshape(2, -1)
    return [kernel, inner, bias.sum(axis=0) if gates == 4 else bias]


def conv_lstm(task: Task) -> Block:
    """Translate ConvLSTM2D."""
    config = task.config
    size, strides = tuple_of(config["kernel_size"], 2), tuple_of(config.get("strides") or 1, 2)
    if task.origin.theano and config.get("padding") == "same" and (any(k % 2 == 0 for k in size) or max(strides) > 1):
        raise InputError(
            f"{task.name!r} pads inside its loop as Theano did, which Keras 3 cannot for even kernels or strides; rebuild it"
        )
    arrays = list(task.arrays)
    if config.get("data_format") == "channels_first" and task.origin.major == 1:
        arrays = [x.transpose(2, 3, 1, 0) if x.ndim == 4 else x for x in arrays]
        task.converted.append("kernels turned to (spatial, in, out)")
    arrays = [flipped(task, x, 2) if x.ndim == 4 else x for x in arrays]
    layer = layers.ConvLSTM2D(
        filters=int(config["filters"]),
        kernel_size=size,
        strides=strides,
        padding=config.get("padding", "valid"),
        dilation_rate=tuple_of(config.get("dilation_rate") or 1, 2),
        activation=_own_activation(task, config.get("activation", "tanh")),
        recurrent_activation=_gate_activation(task),
        use_bias=bool(config.get("use_bias", True)),
        dropout=float(config.get("dropout") or 0),
        recurrent_dropout=float(config.get("recurrent_dropout") or 0),
        **{key: bool(config[key]) for key in _FLAGS[:4] if key in config},
        **task.arguments.common(config, "kernel", "recurrent", "bias"),
        **task.base,
    )
    return Block([layer], [(layer, arrays_of(task, arrays))])
