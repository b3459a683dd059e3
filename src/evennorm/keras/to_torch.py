"""A Keras model goes in; the arrays of a torch state_dict come out, for the layers that torch has, with what was assumed.

    Dense kernel (in, out)                          Linear weight (out, in)
    Conv kernel (*size, in / groups, out)           Conv weight (out, in / groups, *size)
    Conv transpose kernel (*size, out, in)          ConvTranspose weight (in, out, *size)
    DepthwiseConv kernel (*size, in, multiplier)    Conv weight (in * multiplier, 1, *size), groups=in

What is flattened is in another order in a channels-first network: layers behind a Flatten are reordered with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers

from evennorm.core.network import Network, Step
from evennorm.core.state import BatchNormState
from evennorm.keras.network import batch_norm_state, network
from evennorm.keras.program import layers_by_path
from evennorm.keras.roles import BATCH_NORMS

Arrays = dict[str, np.ndarray]

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_ELEMENTWISE = (
    layers.Activation,
    layers.Dropout,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.AlphaDropout,
    layers.ReLU,
    layers.LeakyReLU,
    layers.ELU,
    layers.Identity,
    *BATCH_NORMS,
)
"""Layers that leave flattened values where they are."""


@dataclass
class StateDict:
    """Arrays by the names of torch, and what the user has to know."""

    arrays: Arrays = field(default_factory=dict)
    norms: dict[str, BatchNormState] = field(default_factory=dict)
    """The batch normalizations, whose eps and momentum stand in no state_dict."""
    written: dict[str, str] = field(default_factory=dict)
    """By Keras path: the torch layer that it is written for, and what was done."""
    left: dict[str, str] = field(default_factory=dict)
    """By Keras path: why nothing was written."""

    @property
    def metadata(self) -> dict[str, str]:
        """What torch's modules have to be built with, as text for the header of a safetensors file."""
        return {name: f"eps={s.epsilon:g}, momentum={s.momentum_of_torch}" for name, s in self.norms.items()}


def torch_state_dict(model: keras.Model, epsilon: float | None = None) -> StateDict:
    """The weights of a Keras model for torch layers of the same names, "/" in nested ones as ".".

    Args:
        model: any Keras model; of those whose graph is not written down, flattened values keep Keras's order.
        epsilon: of the torch modules, where it is to be another than Keras's: variances are changed so that inference stays
            the same. By default modules are to be built with the eps that `norms` and `metadata` say.

    Raises:
        ArgumentError: a variance is too small for that epsilon.

    Example:
        >>> import keras
        >>> from evennorm.keras.to_torch import torch_state_dict
        >>> parts = [keras.Input((4,)), keras.layers.Dense(3, name="fc"), keras.layers.BatchNormalization(name="bn")]
        >>> found = torch_state_dict(keras.Sequential(parts))
        >>> {name: array.shape for name, array in found.arrays.items()}["fc.weight"], found.metadata
        ((3, 4), {'bn': 'eps=0.001, momentum=0.01'})
    """
    result = StateDict()
    orders = dict(_orders(model))
    for path, layer in layers_by_path(model).items():
        if not layer.weights or isinstance(layer, keras.Model):
            continue
        if any(path.startswith(f"{done}/") for done in result.written):
            continue
        name = path.replace("/", ".")
        order, why = orders.get(id(layer), (None, ""))
        if why:
            result.left[path] = why
        elif isinstance(layer, BATCH_NORMS):
            _norm(result, path, name, layer, order, epsilon)
        else:
            _plain(result, path, name, layer, order)
    return result


def _norm(result: StateDict, path: str, name: str, layer: Any, order: np.ndarray | None, epsilon: float | None) -> None:
    state = batch_norm_state(layer, path)
    if state.mode == 1 or len(state.axis) > 1:
        result.left[path] = f"torch has no batch normalization with {'mode=1' if state.mode else f'axes {state.axis}'}"
        return
    state = state if epsilon is None else state.with_epsilon(epsilon)
    parts = {"running_mean": state.mean, "running_var": state.variance}
    if state.gamma is not None or state.beta is not None:  # torch has both or none
        parts["weight"] = np.ones_like(state.mean) if state.gamma is None else state.gamma
        parts["bias"] = np.zeros_like(state.mean) if state.beta is None else state.beta
    for part, value in parts.items():
        result.arrays[f"{name}.{part}"] = value if order is None else value[order]
    result.arrays[f"{name}.num_batches_tracked"] = np.array(state.updates or 0, "int64")
    result.norms[name] = state
    result.written[path] = f"BatchNorm, eps={state.epsilon:g}, momentum={state.momentum_of_torch}" + _reordered(order)


def _plain(result: StateDict, path: str, name: str, layer: Any, order: np.ndarray | None) -> None:
    found = next(((kind, make) for kind, make in _LAYERS if type(layer) in kind), None)
    if found is None:
        if not any(True for _ in layer._flatten_layers(include_self=False)):
            result.left[path] = f"{type(layer).__name__} has no counterpart that is written here"
        return
    word, arrays = found[1](layer, order)
    result.arrays.update({f"{name}.{key}": value for key, value in arrays.items()})
    result.written[path] = word + _reordered(order)


def _reordered(order: np.ndarray | None) -> str:
    return "" if order is None else ", reordered as channels-first values are flattened"


def _dense(layer: Any, order: np.ndarray | None) -> tuple[str, Arrays]:
    kernel = _array(layer.kernel)
    return "Linear", {"weight": (kernel if order is None else kernel[order]).T, **_bias(layer)}


def _convolution(layer: Any, order: np.ndarray | None) -> tuple[str, Arrays]:
    kernel = _array(layer.kernel)
    rank = kernel.ndim - 2
    return f"Conv{rank}d", {"weight": kernel.transpose(rank + 1, rank, *range(rank)), **_bias(layer)}


def _transposed(layer: Any, order: np.ndarray | None) -> tuple[str, Arrays]:
    kernel = _array(layer.kernel)
    rank = kernel.ndim - 2
    return f"ConvTranspose{rank}d", {"weight": kernel.transpose(rank + 1, rank, *range(rank)), **_bias(layer)}


def _depthwise_weight(kernel: np.ndarray) -> np.ndarray:
    rank = kernel.ndim - 2
    return kernel.transpose(rank, rank + 1, *range(rank)).reshape(-1, 1, *kernel.shape[:rank])


def _depthwise(layer: Any, order: np.ndarray | None) -> tuple[str, Arrays]:
    kernel = _array(layer.kernel)
    word = f"Conv{kernel.ndim - 2}d, groups={kernel.shape[-2]}"
    return word, {"weight": _depthwise_weight(kernel), **_bias(layer)}


def _separable(layer: Any, order: np.ndarray | None) -> tuple[str, Arrays]:
    depthwise, pointwise = _array(layer.depthwise_kernel), _array(layer.pointwise_kernel)
    rank = pointwise.ndim - 2
    arrays = {
        "depthwise.weight": _depthwise_weight(depthwise),
        "pointwise.weight": pointwise.transpose(rank + 1, rank, *range(rank)),
    }
    arrays |= {f"pointwise.{key}": value for key, value in _bias(layer).items()}
    return f"Conv{rank}d named depthwise, without bias, and Conv{rank}d named pointwise", arrays


def _embedding(layer: Any, order: np.ndarray | None) -> tuple[str, Arrays]:
    return "Embedding", {"weight": _array(layer.embeddings)}


def _layer_norm(layer: Any, order: np.ndarray | None) -> tuple[str, Arrays]:
    arrays = {"weight": layer.gamma, "bias": layer.beta}
    return f"LayerNorm, eps={layer.epsilon:g}", {key: _array(value) for key, value in arrays.items() if value is not None}


def _prelu(layer: Any, order: np.ndarray | None) -> tuple[str, Arrays]:
    return "PReLU", {"weight": _array(layer.alpha).reshape(-1)}


_LAYERS: tuple[tuple[tuple[type, ...], Callable[[Any, np.ndarray | None], tuple[str, Arrays]]], ...] = (
    ((layers.Dense,), _dense),
    (_CONVOLUTIONS, _convolution),
    (_TRANSPOSED, _transposed),
    (_DEPTHWISE, _depthwise),
    (_SEPARABLE, _separable),
    ((layers.Embedding,), _embedding),
    ((layers.LayerNormalization,), _layer_norm),
    ((layers.PReLU,), _prelu),
)


def _bias(layer: Any) -> Arrays:
    return {} if layer.bias is None else {"bias": _array(layer.bias)}


def _array(value: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(value))


def _orders(model: keras.Model) -> Iterator[tuple[int, tuple[np.ndarray | None, str]]]:
    """For layers that take flattened values: where each stands when channels are flattened first; or why that is unknown."""
    found = network(model)
    shapes: dict[int, set[tuple[int | None, ...] | None]] = {}
    for step in found.steps:
        if isinstance(step.handle, layers.Dense | BATCH_NORMS[0] | BATCH_NORMS[1]):
            shapes.setdefault(id(step.handle), set()).add(_flattened(found, step))
    for layer, taken in shapes.items():
        known = [shape for shape in taken if shape is not None]
        if len(taken) > 1:
            yield layer, (None, "it is called on values that are flattened in different orders")
        elif known and None in known[0]:
            yield layer, (None, f"it takes values flattened from the shape {known[0]}, which is to be known")
        elif known:
            places = np.arange(np.prod(np.array(known[0]))).reshape([int(size or 0) for size in known[0]])
            yield layer, (np.moveaxis(places, -1, 0).reshape(-1), "")


def _flattened(found: Network, step: Step) -> tuple[int | None, ...] | None:
    """The channels-last shape of a sample whose flattened values a step takes."""
    while len(step.inputs) == 1:
        step = found[step.inputs[0]]
        if isinstance(step.handle, layers.Flatten):
            shape = found[step.inputs[0]].shape if step.inputs else None
            return None if shape is None or len(shape) < 3 or step.handle.data_format != "channels_last" else shape[1:]
        if not isinstance(step.handle, _ELEMENTWISE):
            break
    return None
