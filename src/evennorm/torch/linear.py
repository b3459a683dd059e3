"""Say what a step of a torch model does to a scale and shift: linear layer, passage or obstacle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import conv, dropout, padding
from torch.nn.utils import parametrize

from evennorm.models.fold_plan import LinearLayer, Passage
from evennorm.models.folding import Layout, Linear
from evennorm.models.network import Role, Step
from evennorm.torch.conversion.steps import is_watched
from evennorm.torch.network import Reading
from evennorm.torch.recording import Run

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = (nn.Linear, nn.Embedding, *_CONVOLUTIONS, *_TRANSPOSED)
"""Linear layers of exactly these classes; derived classes may compute anything else."""

_ZERO_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_OTHER_PADS = (padding._ReflectionPadNd, padding._ReplicationPadNd, padding._CircularPadNd)
_MAXIMA = ("MaxPool1d", "MaxPool2d", "MaxPool3d", "AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d")
_AVERAGES = ("AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d")
_INTERPOLATIONS = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear")
_MAXIMUM_FUNCTIONS = ("max_pool1d", "max_pool2d", "max_pool3d")
_AVERAGE_FUNCTIONS = ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
_COPIES = ("contiguous", "clone", "detach")


class Describer:
    """A description of what the steps of a model compute on example inputs; `read` is what its code read of its layers."""

    def __init__(
        self,
        model: nn.Module,
        reading: Reading,
        ran: Mapping[nn.Module, Run],
        read: Mapping[nn.Module, Collection[str]] = MappingProxyType({}),
    ):
        self._network = reading.network
        self._nodes = reading.nodes
        self._ran = ran
        self._calls = Counter(id(step.handle) for step in reading.network.steps)
        self._holders: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                self._holders.setdefault(id(parameter), []).append(module)
        self._read = read

    def __call__(self, step: Step) -> LinearLayer | Passage | str:
        if step.role is Role.LINEAR:
            return self._linear(step)
        found = self._function(step) if step.handle is None else self._passage(step)
        if found is not None:
            return found
        if step.role is Role.ACTIVATION:
            return f"the activation {step.layer} stands in between"
        if step.role is Role.INPUT:
            return f"the input {step.layer} is no linear layer"
        if step.kind == "unknown":
            return f"what stands at {step.layer} is not known"
        return f"{step.layer} ({step.kind}) is neither linear nor lets a scale and shift pass"

    def shape(self, step: Step) -> tuple[int | None, ...] | None:
        run = self._ran.get(step.handle)
        return step.shape if step.shape is not None or run is None else run.shape

    def miscounted(self, step: Step) -> str:
        """Return why the recorded calls of a layer are not all there are; "" if they are."""
        if step.handle is None:
            return ""
        run = self._ran.get(step.handle)
        if run is None:
            return "did not run on the example inputs"
        read = self._calls[id(step.handle)]
        return (
            "" if run.times == read else f"ran {run.times} times on the example inputs, and {read} can be read in the code"
        )

    # Linear layers

    def _linear(self, step: Step) -> LinearLayer | str:
        layer = step.handle
        if type(layer) not in _FOLDABLE and not (layer is not None and parametrize.is_parametrized(layer)):
            return f"{step.layer} is a {step.kind}, into which nothing is folded"
        obstacle = self._obstacle(step, layer)
        if obstacle:
            return LinearLayer(obstacle=obstacle)
        kernel = layout_of(layer).canonical(array_of(layer.weight))
        bias = getattr(layer, "bias", None)
        maps = (Linear(kernel, None if bias is None else array_of(bias).astype("float64")),)
        shape = self.shape(step)
        if shape is None:
            return LinearLayer(obstacle="has an output whose shape is not known")
        if isinstance(layer, conv._ConvNd):
            batched = len(shape) == len(layer.kernel_size) + 2
            axis = 1 if batched else 0
        else:
            axis = len(shape) - 1
        return LinearLayer(maps, axis, None if isinstance(layer, nn.Embedding) else axis, _border(layer))

    def _obstacle(self, step: Step, layer: Any) -> str:
        if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
            return "has a weight that is made of others (weight_norm, pruning)"
        if any(nn.parameter.is_lazy(each) for each in layer.parameters()):
            return "has no weight yet"
        if is_watched(layer):
            return "has hooks, which see its input and output"
        if not layer.weight.is_floating_point():
            return f"has weights of {layer.weight.dtype}"
        others = [each for parameter in layer.parameters() for each in self._holders[id(parameter)] if each is not layer]
        if others:
            return f"shares its weight with a {type(others[0]).__name__}"
        named = [name for name in ("weight", "bias") if name in self._read.get(layer, ())]
        if named:
            return f"has a {named[0]} that the model's code reads too"
        if getattr(layer, "max_norm", None) is not None:
            return "scales its rows to max_norm"
        return self.miscounted(step)

    # Passages

    def _passage(self, step: Step) -> Passage | None:
        module, kind = step.handle, step.kind
        if is_watched(module) or self.miscounted(step):
            return None
        if isinstance(module, dropout._DropoutNd) or type(module) is nn.Identity:
            return Passage()
        if kind in _MAXIMA:
            return None if module.return_indices else Passage(if_order_kept=True)
        if kind in _AVERAGES:
            return Passage()
        if type(module) in (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d):
            padded = any(_numbers(module.padding)) and module.count_include_pad
            return None if padded or getattr(module, "divisor_override", None) else Passage()
        if type(module) in _ZERO_PADS or (isinstance(module, padding._ConstantPadNd) and module.value == 0):
            return Passage(if_zero_kept=True)
        if isinstance(module, _OTHER_PADS) or (type(module) is nn.Upsample and module.mode in _INTERPOLATIONS):
            return Passage()
        return self._flattening(step) if type(module) is nn.Flatten else None

    def _function(self, step: Step) -> Passage | None:
        node = self._nodes.get(step.name)
        if node is None:
            return None
        arguments = [*node.args[1:], *node.kwargs.values()]
        if step.kind in _COPIES or (step.role is Role.DROPOUT and _is_off(node)):
            return Passage()
        if step.kind in _AVERAGE_FUNCTIONS:
            return Passage()
        if step.kind in _MAXIMUM_FUNCTIONS:
            return None if "return_indices" in node.kwargs else Passage(if_order_kept=True)
        if step.kind == "mean" and step.inputs:
            shape = self.shape(self._network[step.inputs[0]])
            axes = _axes_of_mean(node, shape)
            return Passage() if axes and min(axes) >= 2 else None
        if step.kind in ("flatten", "view", "reshape") and not any(isinstance(each, Tensor) for each in arguments):
            return self._flattening(step) if _keeps_samples(step, node) else None
        return None

    def _flattening(self, step: Step) -> Passage | None:
        before = self.shape(self._network[step.inputs[0]]) if step.inputs else None
        after = self.shape(step)
        if not before or not after or None in (*before, *after):
            return None
        sizes = tuple(int(size) for size in before[1:] if size is not None)
        if len(after) != 2 or after[0] != before[0]:
            return None
        return Passage(flattens=sizes)


def _keeps_samples(step: Step, node: fx.Node) -> bool:
    """Return whether a row is one sample whatever the sizes: x.view(-1, 512) makes more rows of larger images."""
    if step.kind == "flatten":
        return True
    sizes: Any = node.kwargs.get("shape", node.kwargs.get("size", node.args[1:]))
    while isinstance(sizes, tuple | list) and sizes:
        sizes = sizes[0]
    return isinstance(sizes, fx.Node)


def _is_off(node: fx.Node) -> bool:
    training: Any = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    return training is False


def _axes_of_mean(node: fx.Node, shape: tuple[int | None, ...] | None) -> list[int]:
    axes: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if shape is None or axes is None:
        return []
    axes = axes if isinstance(axes, tuple | list) else [axes]
    return [axis % len(shape) for axis in axes] if all(isinstance(axis, int) for axis in axes) else []


def _numbers(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _border(layer: Any) -> str:
    if type(layer) in _TRANSPOSED:
        fits = all(
            stride == 1 and pad >= dilation * (size - 1)
            for stride, pad, dilation, size in zip(
                layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True
            )
        )
        return (
            "" if fits and not any(layer.output_padding) else "is transposed, and its outputs do not all see the same taps"
        )
    if type(layer) not in _CONVOLUTIONS or layer.padding_mode != "zeros" or layer.padding == "valid":
        return ""
    padded = any(size != 1 for size in layer.kernel_size) if layer.padding == "same" else any(_numbers(layer.padding))
    return "pads its input with zeros, which are not shifted" if padded else ""


def layout_of(layer: Any) -> Layout:
    """Return the memory layout of the weight of a linear layer."""
    weight = layer.weight.shape
    if isinstance(layer, nn.Embedding):
        return Layout("tigo", {"t": 1, "i": weight[0], "g": 1, "o": weight[1]})
    groups = getattr(layer, "groups", 1)
    taps = int(torch.tensor(weight[2:]).prod()) if len(weight) > 2 else 1
    if type(layer) in _TRANSPOSED:
        return Layout("giot", {"g": groups, "i": weight[0] // groups, "o": weight[1], "t": taps})
    return Layout("goit", {"g": groups, "o": weight[0] // groups, "i": weight[1], "t": taps})


def write(layer: Any, maps: tuple[Linear, ...]) -> None:
    """Set the kernel and bias of a linear layer."""
    (linear,) = maps
    kernel = linear.kernel
    if isinstance(layer, nn.Embedding) and linear.bias is not None:
        kernel = kernel + linear.bias.reshape(1, -1, 1, 1)  # each output is one row, not a sum
    weight = layer.weight
    values = torch.from_numpy(layout_of(layer).restored(kernel, tuple(weight.shape)).copy())
    with torch.no_grad():
        weight.copy_(values)
    if not isinstance(layer, nn.Embedding):
        bias = torch.from_numpy(linear.bias.copy()).to(dtype=weight.dtype, device=weight.device)  # type: ignore[union-attr]
        layer.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)


def array_of(tensor: Tensor) -> Any:
    """Return a tensor as NumPy's float64."""
    return tensor.detach().cpu().double().numpy()
