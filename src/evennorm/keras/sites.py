"""Find the places in a Keras model's graph where batch normalization may be: activations, sources, channel axes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import keras
from keras import KerasTensor as Tensor
from keras import Operation, layers

from evennorm.errors import ArgumentError
from evennorm.keras.graph import Node, calls, data_inputs, graph, is_model
from evennorm.keras.layer import BatchNormalization

LINEAR = (
    layers.Dense,
    layers.EinsumDense,
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
    layers.SeparableConv1D,
    layers.SeparableConv2D,
)
"""Layers with a linear map, a bias and an activation, in this order; their subclasses may compute anything else."""

ACTIVATIONS = (layers.ReLU, layers.LeakyReLU, layers.PReLU, layers.ELU)
OPS = {
    *("Celu", "Elu", "Gelu", "HardShrink", "HardSigmoid", "HardSilu", "HardTanh", "LeakyRelu", "LogSigmoid", "ReLU", "Relu"),
    *(
        "Relu6",
        "Selu",
        "Sigmoid",
        "Silu",
        "SoftShrink",
        "Softplus",
        "Softsign",
        "SparsePlus",
        "Squareplus",
        "Tanh",
        "TanhShrink",
    ),
}
"""Classes of `keras.activations.relu(x)` and `keras.ops.relu(x)`, called on a tensor without a layer."""

NO_ACTIVATION = (None, keras.activations.linear, keras.activations.softmax, keras.activations.log_softmax)
"""Softmax makes probabilities, of classes or of attention, which their readers need unchanged."""

RAW_INPUT = (layers.Masking, layers.Reshape, layers.Permute, layers.Identity)
"""Layers that belong between an input and its normalization: they tell padding, or which axis is the channel."""


def is_normalization(operation: Operation) -> bool:
    """Return whether an operation is batch normalization and nothing else: ours or Keras's, also inside TimeDistributed."""
    if isinstance(operation, layers.TimeDistributed):
        operation = operation.layer
    if isinstance(operation, BatchNormalization):
        return operation.activation in NO_ACTIVATION[:2]
    return isinstance(operation, layers.BatchNormalization)


def has_fused_activation(operation: Operation) -> bool:
    """Return whether an operation is a linear layer that applies an activation itself."""
    return type(operation) in LINEAR and operation.activation not in NO_ACTIVATION


def is_activation(operation: Operation) -> bool:
    """Return whether an operation is an activation and nothing else. A batch normalization with one counts: its activation
    remains."""
    if isinstance(operation, layers.Activation | BatchNormalization):
        return operation.activation not in NO_ACTIVATION
    from_keras = type(operation).__module__.startswith("keras.")
    return isinstance(operation, ACTIVATIONS) or (from_keras and type(operation).__name__ in OPS)


def activation_name(activation: Any) -> str:
    """Return a name for an activation that can be part of a layer's name."""
    name = getattr(activation, "__name__", None) or getattr(activation, "name", None) or type(activation).__name__
    return re.sub(r"\W+", "", name) or "activation"


class Sites:
    """One model's graph, read with its batch normalizations left out; nested models are single operations here."""

    def __init__(self, model: keras.Model):
        self.model = model
        self._outputs: list[Tensor] = graph(model).outputs
        self._producer = {id(x): node for node in calls(model) for x in node.outputs}
        self.calls: list[Node] = self._without_masks()
        self._readers: dict[int, list[Node]] = {}
        for node in self.calls:
            for x in data_inputs(node):
                self._readers.setdefault(id(x), []).append(node)

    def _without_masks(self) -> list[Node]:
        """Return the calls that make the outputs or the inputs, rather than only a mask."""
        found = {self._producer[id(x)] for x in graph(self.model).inputs}
        waiting = list(self._outputs)
        while waiting:
            node = self._producer[id(waiting.pop())]
            if node not in found:
                found.add(node)
                waiting += data_inputs(node)
        return [node for node in calls(self.model) if node in found]

    def source(self, tensor: Tensor) -> tuple[Node, Tensor]:
        """Return the call that made a tensor, and its output, skipping batch normalizations in between."""
        node = self._producer[id(tensor)]
        while is_normalization(node.operation) and not node.is_input:
            tensor = data_inputs(node)[0]
            node = self._producer[id(tensor)]
        return node, tensor

    def readers(self, tensor: Tensor) -> list[Node]:
        """Return the calls that read a tensor, skipping batch normalizations in between."""
        found = []
        for node in self._readers.get(id(tensor), []):
            found += self.readers(node.outputs[0]) if is_normalization(node.operation) else [node]
        return found

    def directly_normalized(self, tensor: Tensor) -> bool:
        """Return whether only batch normalizations that have a beta read a tensor."""
        nodes = self._readers.get(id(tensor), [])
        inner = [getattr(node.operation, "layer", node.operation) for node in nodes]
        plain = all(is_normalization(node.operation) or isinstance(node.operation, BatchNormalization) for node in nodes)
        return bool(nodes) and plain and all(layer.center for layer in inner) and not self.is_output(tensor)

    def is_output(self, tensor: Tensor) -> bool:
        """Return whether a tensor, or a batch normalization of it, leaves the model."""
        return any(self.source(output)[1] is tensor for output in self._outputs)

    def output_part(self) -> set[Operation]:
        """Return the operations from the last layers with weights to the outputs, both included; also inside nested
        models."""
        part: set[Operation] = set()
        waiting = list(self._outputs)
        while waiting:
            node, _ = self.source(waiting.pop())
            operation = node.operation
            if node.is_input:
                continue
            part.add(operation)
            if is_model(operation):
                part |= Sites(operation).output_part()
            if (
                is_activation(operation)
                or isinstance(operation, BatchNormalization)
                or not getattr(operation, "weights", None)
            ):
                waiting += data_inputs(node)
        return part

    def origin(self, tensor: Tensor) -> tuple[Operation | None, Any]:
        """Return what a tensor is computed from before activations: the layer with weights if there is one; and a key of
        both.

        A layer shared by two branches gives both the same key, so that they share a normalization. An activation layer
        shared by many convolutions does not.
        """
        stage, (node, found) = 0, self.source(tensor)
        while is_activation(node.operation) and not node.is_input:
            stage += 1
            node, found = self.source(data_inputs(node)[0])
        if getattr(node.operation, "weights", None):
            index = next(i for i, x in enumerate(node.outputs) if x is found)
            return node.operation, (node.operation, index, stage)
        return None, (id(tensor), stage)

    def channel_axis(self, tensor: Tensor) -> int:
        """Return 1 where the layers around a tensor are channels-first, else -1; or the axis of a batch normalization that
        was there.

        Raises:
            ArgumentError: that axis has no known size.
        """
        rank = len(tensor.shape)
        axis = -1
        if rank > 2:
            axis = next((a for a in self._axes_behind(tensor, rank)), -1)
        if rank < 2 or tensor.shape[axis] is None:
            raise ArgumentError(
                f"gamma and beta need a channel axis of known size; the tensor {tensor.name!r} of model {self.model.name!r} "
                f"has shape {tuple(tensor.shape)} and channel axis {axis}; give that size in keras.Input"
            )
        return axis

    def _axes_behind(self, tensor: Tensor, rank: int) -> Iterator[int]:
        """Yield what the layers say about the channel axis: the makers of the tensor first, then its readers."""
        x, node = tensor, self._producer[id(tensor)]
        while len(x.shape) == rank:
            yield from _declared_axis(node.operation, rank, of_output=True)
            if node.is_input or isinstance(node.operation, layers.Reshape | layers.Permute):
                break
            x = data_inputs(node)[0]
            node = self._producer[id(x)]
        waiting = [tensor]
        while waiting:
            x = waiting.pop(0)
            for node in self._readers.get(id(x), []):
                if len(x.shape) != rank or isinstance(node.operation, layers.Reshape | layers.Permute):
                    continue
                if isinstance(node.operation, layers.Flatten):
                    if rank > 3 and node.operation.data_format == "channels_first":  # channels last is only a default
                        yield 1
                    continue
                yield from _declared_axis(node.operation, rank)
                waiting += node.outputs


def _declared_axis(operation: Operation, rank: int, of_output: bool = False) -> Iterator[int]:
    """Yield the channel axis of an operation's input or output, where its own arguments state it."""
    if is_model(operation):
        for inner in graph(operation).operations:
            yield from _declared_axis(inner, rank, of_output)
    elif isinstance(operation, layers.BatchNormalization | BatchNormalization):
        axis = operation.axis
        if isinstance(axis, int):
            yield -1 if axis in (-1, rank - 1) else axis
    elif isinstance(operation, layers.EinsumDense):
        axis = _einsum_axis(operation.equation, rank, of_output)
        if axis is not None:
            yield -1 if axis == rank - 1 else axis
    elif type(operation) is layers.Dense or isinstance(operation, layers.Embedding | layers.RNN):
        yield -1
    elif getattr(operation, "data_format", None) in ("channels_first", "channels_last") and not isinstance(
        operation, layers.Flatten
    ):
        yield 1 if operation.data_format == "channels_first" else -1


def _einsum_axis(equation: str, rank: int, of_output: bool) -> int | None:
    """Return the axis of the features that an equation sums over, or of those that it makes; None where there are several.

    Example:
        >>> _einsum_axis("abc,cd->adb", 3, of_output=True), _einsum_axis("abc,cd->adb", 3, of_output=False)
        (1, 2)
        >>> _einsum_axis("...x,xy->...y", 4, of_output=True), _einsum_axis("abc,cde->abde", 4, of_output=True)
        (3, None)
    """
    taken, kernel, made = re.split(r",|->", equation.replace(" ", ""))
    here, there = (made, taken) if of_output else (taken, made)
    found = [letter for letter in here.replace("...", "") if letter in kernel and letter not in there]
    if len(found) != 1:
        return None
    before, _, behind = here.partition("...")
    return before.index(found[0]) if found[0] in before else rank - len(behind) + behind.index(found[0])


def behind_raw_layers(sites: Sites, tensor: Tensor) -> tuple[Node, Tensor]:
    """Return the first place after an input where values are final and the channel axis is known."""
    node, _ = sites.source(tensor)
    readers = sites.readers(tensor)
    while len(readers) == 1 and len(readers[0].outputs) == 1 and _needs_raw_input(readers[0].operation, tensor):
        node, tensor = readers[0], readers[0].outputs[0]
        readers = sites.readers(tensor)
    return node, tensor


def _needs_raw_input(operation: Operation, tensor: Tensor) -> bool:
    # Flatten makes features of (N, 28, 28), whose last axis is no channel; of (N, 28, 28, 3) the channel is known before it.
    if isinstance(operation, layers.Flatten):
        return len(tensor.shape) == 3
    return isinstance(operation, RAW_INPUT) or type(operation).__module__.startswith("keras.src.layers.preprocessing.")


def holds_indices(sites: Sites, tensor: Tensor) -> bool:
    """Return whether an Embedding reads a tensor, here or in a nested model: such values are indices, whatever their
    dtype."""
    return any(
        any(holds_indices(Sites(reader.operation), x) for x in reader.operation.inputs)
        if is_model(reader.operation)
        else isinstance(reader.operation, layers.Embedding)
        for reader in sites.readers(tensor)
    )
