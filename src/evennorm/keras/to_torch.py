"""Translate a Keras model to the arrays of a torch state_dict, and say what was assumed.

    Dense kernel (in, out)                          Linear weight (out, in)
    Conv kernel (*size, in / groups, out)           Conv weight (out, in / groups, *size)
    Conv transpose kernel (*size, out, in)          ConvTranspose weight (in, out, *size)
    DepthwiseConv kernel (*size, in, multiplier)    Conv weight (in * multiplier, 1, *size), groups=in

A channels-first network flattens in another order: layers after a Flatten are reordered with it, or left out
where the order is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers

from evennorm.keras.network import batch_norm_state, network
from evennorm.keras.program import layers_by_path
from evennorm.keras.roles import BATCH_NORMS
from evennorm.keras.sites import LINEAR
from evennorm.models.network import Network, Step
from evennorm.models.state import BatchNormState

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
_SUMS = (layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum)
"""Layers with several inputs that leave flattened values where they are."""
_PER_FEATURE = (layers.Dense, layers.PReLU, layers.LayerNormalization, *BATCH_NORMS)
"""Layers with a weight for each of their input features."""
_NEW_FEATURES = (*LINEAR, layers.Embedding, layers.RNN, layers.Bidirectional)
"""Layers whose output features are not their input features."""


@dataclass
class StateDict:
    """Arrays by their names in torch, and what the user has to know."""

    arrays: Arrays = field(default_factory=dict)
    norms: dict[str, BatchNormState] = field(default_factory=dict)
    """The batch normalizations, whose eps and momentum are not part of a state_dict."""
    written: dict[str, str] = field(default_factory=dict)
    """By Keras path: the torch layer that the arrays are written for, and what was done."""
    left: dict[str, str] = field(default_factory=dict)
    """By Keras path: why nothing was written."""

    @property
    def metadata(self) -> dict[str, str]:
        """The arguments that torch's modules have to be built with, as text for the header of a safetensors file."""
        return {name: f"eps={s.epsilon:g}, momentum={s.momentum_of_torch}" for name, s in self.norms.items()}


def torch_state_dict(model: keras.Model, epsilon: float | None = None) -> StateDict:
    """Return the weights of a Keras model for torch layers of the same names, "/" in nested ones as ".".

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
    if state.gamma is not None or state.beta is not None:  # torch has weight and bias, or neither
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
    known = {key: _array(value) for key, value in arrays.items() if value is not None}
    return f"LayerNorm, eps={layer.epsilon:g}", known if order is None else {key: x[order] for key, x in known.items()}


def _prelu(layer: Any, order: np.ndarray | None) -> tuple[str, Arrays]:
    weight = _array(layer.alpha).reshape(-1)
    return "PReLU", {"weight": weight if order is None else weight[order]}


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
    """Yield for each layer that takes flattened values where each value is when channels are flattened first; or why that is
    unknown."""
    found = network(model)
    taken: dict[int, list[_Order]] = {}
    for step in found.steps:
        if isinstance(step.handle, _PER_FEATURE) and step.shape is not None and len(step.shape) == 2:
            taken.setdefault(id(step.handle), []).append(_order(found, step.inputs))
    for layer, orders in taken.items():
        unknown = next((each for each in orders if isinstance(each, str)), None)
        if unknown is not None:
            yield layer, (None, unknown)
        elif not all(_same(each, orders[0]) for each in orders):
            yield layer, (None, "it is called on values that are flattened in different orders")
        elif not isinstance(orders[0], str):
            yield layer, (orders[0], "")


_Order = np.ndarray | str | None
"""The positions of flattened values in Keras's order; None where they are the same; or why they are unknown."""


def _same(a: _Order, b: _Order) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def _order(found: Network, inputs: Sequence[str]) -> _Order:
    """Return the order of the values that these steps give."""
    orders = [_order_of(found, found[name]) for name in inputs]
    unknown = next((each for each in orders if isinstance(each, str)), None)
    if unknown is not None:
        return unknown
    return orders[0] if orders and all(_same(each, orders[0]) for each in orders) else _mixed(orders)


def _mixed(orders: Sequence[_Order]) -> _Order:
    return "it takes values that are flattened in different orders" if orders else None


def _order_of(found: Network, step: Step) -> _Order:
    layer = step.handle
    if isinstance(layer, layers.Flatten) or (isinstance(layer, layers.Reshape) and len(layer.target_shape) == 1):
        return _flattened(found, step)
    if isinstance(layer, _NEW_FEATURES) or not step.inputs:
        return None
    before = _order(found, step.inputs)
    keeps = isinstance(layer, (*_ELEMENTWISE, layers.PReLU, layers.LayerNormalization, *_SUMS))
    if before is None or isinstance(before, str) or keeps:
        return before
    return f"it takes flattened values by way of {step.layer}, which may put them in another order"


def _flattened(found: Network, step: Step) -> _Order:
    """Return the order of the values after a Flatten, as torch flattens its input there."""
    shape = found[step.inputs[0]].shape if step.inputs else None
    if shape is None:
        return "it takes flattened values of a shape that is not known"
    rank = len(shape)
    channel = _channel(found, found[step.inputs[0]], rank)
    moved = getattr(step.handle, "data_format", None) == "channels_first" and isinstance(step.handle, layers.Flatten)
    here = [*range(2, rank), 1] if moved else list(range(1, rank))
    natural = list(range(1, rank))
    there = natural if channel is None else [channel, *(axis for axis in natural if axis != channel)]
    if here == there:
        return None
    if None in shape[1:]:
        return f"it takes values flattened from the shape {shape[1:]}, which is to be known"
    sizes = [int(shape[axis] or 0) for axis in here]
    places = np.arange(int(np.prod(sizes))).reshape(sizes)
    order = places.transpose([here.index(axis) for axis in there]).reshape(-1)
    return None if np.array_equal(order, np.arange(order.size)) else order


def _channel(found: Network, step: Step, rank: int) -> int | None:
    """Return the channel axis of what is flattened, which torch has before the positions; None where axes stay in order.

    Convolutions and pooling say where the channels are; sequences of features, as recurrent and dense layers and embeddings
    give, have no other order in torch, nor has an input of two axes, such as 28 rows of 28 pixels.
    """
    while step.shape is not None and len(step.shape) == rank:
        layer = step.handle
        if isinstance(layer, layers.Dense | layers.EinsumDense | layers.Embedding | layers.RNN | layers.Bidirectional):
            return None if rank < 4 else rank - 1
        if getattr(layer, "data_format", None) in ("channels_first", "channels_last"):
            return 1 if layer.data_format == "channels_first" else rank - 1
        if isinstance(layer, layers.Reshape | layers.Permute) or not step.inputs:
            break
        step = found[step.inputs[0]]
    return None if rank < 4 else 1 if keras.config.image_data_format() == "channels_first" else rank - 1
