"""Say what a step of a Keras model does to a scale and shift: linear layer, passage or obstacle."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import keras
import numpy as np
from keras import Operation, layers

from evennorm.models.fold_plan import LinearLayer, Passage
from evennorm.models.folding import Layout, Linear
from evennorm.models.network import Network, Role, Step

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_FOLDABLE = (layers.Dense, layers.Embedding, *_CONVOLUTIONS, *_TRANSPOSED, *_DEPTHWISE, *_SEPARABLE)
"""Linear layers of exactly these classes; derived classes may compute anything else."""

_NOTHING_AT_INFERENCE = (layers.GaussianNoise, layers.ActivityRegularization, layers.Identity)
_CROPPINGS = (layers.Cropping1D, layers.Cropping2D, layers.Cropping3D)
_UPSAMPLINGS = (layers.UpSampling1D, layers.UpSampling2D, layers.UpSampling3D)
_PADDED = "pads its input with zeros, which are not shifted"


class Describer:
    """A description of what steps of one network compute; only layers in `within` can be changed."""

    def __init__(self, network: Network, within: Collection[Operation]):
        self._network = network
        self._within = {id(operation) for operation in within}

    def __call__(self, step: Step) -> LinearLayer | Passage | str:
        layer = step.handle
        if step.role is Role.LINEAR:
            return self._linear(step, layer)
        found = None if layer is None else self._passage(step, layer)
        if found is not None:
            return found
        if step.role is Role.ACTIVATION:
            return f"the activation {step.layer} stands in between"
        if step.role is Role.INPUT:
            return f"the input {step.layer} is no linear layer"
        return f"{step.layer} ({step.kind}) is neither linear nor lets a scale and shift pass"

    def _linear(self, step: Step, layer: Any) -> LinearLayer | str:
        if type(layer) not in _FOLDABLE:
            return f"{step.layer} is a {step.kind}, into which nothing is folded"
        if id(layer) not in self._within:
            return f"{step.layer} is called from the code of another layer"
        if getattr(layer, "lora_enabled", False):
            return LinearLayer(obstacle="holds LoRA weights; merge them first")
        if getattr(layer, "quantization_mode", None) is not None:
            return LinearLayer(obstacle="is quantized")
        maps = tuple(Linear(layout.canonical(array_of(kernel)), None) for kernel, layout in kernels(layer))
        if getattr(layer, "bias", None) is not None:
            maps = (*maps[:-1], Linear(maps[-1].kernel, array_of(layer.bias).astype("float64")))
        reads = None if isinstance(layer, layers.Embedding) else step.channel_axis
        return LinearLayer(maps, step.channel_axis, reads, _border(layer))

    def _passage(self, step: Step, layer: Any) -> Passage | None:
        plain = type(layer) is layers.Activation and step.activation is None
        if step.role is Role.DROPOUT or isinstance(layer, _NOTHING_AT_INFERENCE) or plain:
            return None if step.training or step.asked else Passage()
        if type(layer) in _CROPPINGS or type(layer) in _UPSAMPLINGS:
            return Passage()
        if step.role is Role.PADDING:
            return Passage(if_zero_kept=True)
        if step.role is Role.POOLING:
            return _pooling(layer)
        if isinstance(layer, layers.Flatten) or (isinstance(layer, layers.Reshape) and len(layer.target_shape) == 1):
            return self._flattening(step, layer)
        return None

    def _flattening(self, step: Step, layer: Any) -> Passage | None:
        shape = self._network[step.inputs[0]].shape if step.inputs else None
        sizes = () if shape is None else shape[1:]
        moves = getattr(layer, "data_format", "channels_last") == "channels_first" and len(sizes) > 1
        if moves or not sizes or any(size is None for size in sizes):
            return None
        return Passage(flattens=tuple(int(size) for size in sizes if size is not None))


def _pooling(layer: Any) -> Passage | None:
    kind = type(layer).__name__
    maximum = "Max" in kind
    if not maximum and getattr(layer, "padding", "valid") != "valid":
        return None  # whether padded zeros count differs between engines
    axes = None
    if kind.startswith("Global") and not layer.keepdims:
        rank = int(kind[-2]) + 2
        axes = (rank - 1 if layer.data_format == "channels_last" else 1, 1)
    return Passage(if_order_kept=maximum, axes=axes)


def _border(layer: Any) -> str:
    sizes = getattr(layer, "kernel_size", (1,))
    if type(layer) in _TRANSPOSED:
        strides = layer.strides if isinstance(layer.strides, tuple) else (layer.strides,)
        if any(size != 1 for size in (*sizes, *strides)):
            return "is transposed, and its outputs do not all see the same taps"
        return ""
    padded = getattr(layer, "padding", "valid") != "valid" and any(size != 1 for size in sizes)
    return _PADDED if padded else ""


def kernels(layer: Any) -> list[tuple[keras.Variable, Layout]]:
    """Return the kernels of a linear layer in the order they are applied, and their memory layout."""
    if type(layer) in _SEPARABLE:
        return [
            (layer.depthwise_kernel, _depthwise(layer.depthwise_kernel.shape)),
            (layer.pointwise_kernel, _grouped(layer.pointwise_kernel.shape, 1)),
        ]
    kernel = getattr(layer, "_embeddings" if isinstance(layer, layers.Embedding) else "_kernel", None)
    kernel = layer.kernel if kernel is None else kernel
    shape = tuple(kernel.shape)
    if type(layer) in _DEPTHWISE:
        return [(kernel, _depthwise(shape))]
    if type(layer) in _TRANSPOSED:
        return [(kernel, Layout("togi", {"t": int(np.prod(shape[:-2])), "o": shape[-2], "g": 1, "i": shape[-1]}))]
    return [(kernel, _grouped(shape, getattr(layer, "groups", 1)))]


def _grouped(shape: tuple[int, ...], groups: int) -> Layout:
    sizes = {"t": int(np.prod(shape[:-2])), "i": shape[-2], "g": groups, "o": shape[-1] // groups}
    return Layout("tigo", sizes)


def _depthwise(shape: tuple[int, ...]) -> Layout:
    return Layout("tgoi", {"t": int(np.prod(shape[:-2])), "g": shape[-2], "o": shape[-1], "i": 1})


def write(layer: Any, maps: tuple[Linear, ...]) -> None:
    """Set the kernels of a linear layer with a bias, or of an embedding."""
    for (variable, layout), linear in zip(kernels(layer), maps, strict=True):
        kernel = linear.kernel
        if isinstance(layer, layers.Embedding) and linear.bias is not None:
            kernel = kernel + linear.bias.reshape(1, -1, 1, 1)  # each output is one row, not a sum
        _assign(variable, layout.restored(kernel, tuple(variable.shape)))
    if not isinstance(layer, layers.Embedding):
        bias: Any = maps[-1].bias
        _assign(layer.bias, bias)


def _assign(variable: keras.Variable, values: np.ndarray) -> None:
    variable.assign(values.astype("float64" if variable.dtype == "float64" else "float32"))


def array_of(variable: Any) -> np.ndarray:
    """Return the values of a variable; bfloat16, which NumPy cannot convert to float64, as float32."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return np.array(keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32") if dtype == "bfloat16" else variable))
