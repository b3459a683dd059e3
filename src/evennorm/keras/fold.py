"""Copy a Keras model for inference with its batch normalizations folded into neighbouring layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import Operation, layers

from evennorm.keras import legacy
from evennorm.keras.graph import Insertions, Node, calls, copy_layer, data_inputs, graph, models_in, rebuild
from evennorm.keras.layer import BatchNormalization
from evennorm.keras.linear import Describer, write
from evennorm.keras.network import network
from evennorm.models.fold_plan import Folded, Plan, plan
from evennorm.models.folding import ScaleShift
from evennorm.models.network import Network, Step

_KINDS = (layers.BatchNormalization, BatchNormalization, legacy.BatchNormalization)
_HALVES = ("float16", "bfloat16")


def fold(model: keras.Model) -> tuple[keras.Model, Plan]:
    """Return a copy of `model` that predicts the same with fewer layers, and a plan of what became of each batch
    normalization.

    Each batch normalization becomes part of the convolution, dense layer or embedding before or after it,
    where that is exact; else one `keras.layers.Rescaling`. Computed in float64. Activations that our layers apply stay, as
    layers of their own. The copy is for inference: its batch normalizations are gone, and it is not compiled. Names of
    layers stay.

    Args:
        model: a Sequential or functional model with known input shapes; models nested in it are folded too.

    Raises:
        ArgumentError: a model whose layers are called from its own code, or that cannot be copied.

    Example:
        >>> import keras
        >>> from evennorm.keras.fold import fold
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()])
        >>> folded, plan = fold(model)
        >>> [layer.name for layer in folded.layers] == [model.layers[0].name], plan.folded[0].side
        (True, 'behind')
    """
    graph(model)
    within = {operation for inner in models_in(model) for operation in graph(inner).operations}
    found = network(model)
    nodes: dict[Operation, list[Node]] = {}
    for inner in models_in(model):
        for node in calls(inner):
            nodes.setdefault(node.operation, []).append(node)
    made = plan(found, Describer(found, within), lambda step: _fixed(step, nodes))
    return _Rewriting(found, made, nodes).of(model), made


def _fixed(step: Step, nodes: dict[Operation, list[Node]]) -> str:
    """Return why a batch normalization cannot be taken out of the model; "" if it can."""
    layer = step.handle
    if type(layer) not in _KINDS:
        return f"it is a {step.kind}, which may compute anything else"
    if layer not in nodes:
        return "it is called from the code of another layer"
    if step.training or step.asked:
        return "it is called with training=True"
    if step.shape is None or any(step.shape[axis] is None for axis in layer_axes(layer)):
        return "the shape of its output is not known"
    if len(step.shape) < 3 and keras.config.image_data_format() == "channels_first":
        return "keras.layers.Rescaling takes no rows of features under channels_first"
    for node in nodes[layer]:
        given, named = data_inputs(node), node.arguments.kwargs.get("residual")
        if len(given) != 1 + (named is not None) or (named is not None and named is given[0]):
            return "it is called with more than its input and a residual"
    return ""


def layer_axes(layer: Any) -> tuple[int, ...]:
    axis = layer.axis
    return tuple(axis) if isinstance(axis, tuple | list) else (axis,)


class _Rewriting:
    """A copy of a model, layer by layer, by a plan."""

    def __init__(self, network: Network, plan: Plan, nodes: dict[Operation, list[Node]]):
        self._network = network
        self._nodes = nodes
        steps = {step.layer: step for step in reversed(network.steps)}
        self._norms: dict[Any, tuple[Step, Folded]] = {
            steps[each.layer].handle: (steps[each.layer], each) for each in plan.folded if not each.kept
        }
        self._linear: dict[Any, Any] = {steps[path].handle: maps for path, maps in plan.maps.items()}
        self._made: list[tuple[Any, Any]] = []

    def of(self, model: keras.Model) -> keras.Model:
        after: dict[Node, list[keras.Layer]] = {}
        for layer, (_, found) in self._norms.items():
            activation = self._activation(layer)
            if activation is not None and not found.into and not self._residual(layer):
                after |= {node: [activation] for node in self._nodes[layer]}
        folded = rebuild(model, self._copy, Insertions(after=after))
        for layer, maps in self._made:
            write(layer, maps)
        return folded

    def _copy(self, operation: Operation) -> Any:
        if operation in self._linear:
            bias = {} if isinstance(operation, layers.Embedding) else {"use_bias": True}
            new = copy_layer(operation, **bias)
            self._made.append((new, self._linear[operation]))
            return new
        if operation not in self._norms:
            return copy_layer(operation)
        step, found = self._norms[operation]
        first = None if found.into else _rescaling(operation, step)
        if self._residual(operation):
            return _summed(operation, first, self._activation(operation))
        return self._activation(operation) if found.into else first

    def _residual(self, layer: Any) -> bool:
        return any("residual" in node.arguments.kwargs for node in self._nodes[layer])

    def _activation(self, layer: Any) -> keras.Layer | None:
        """Return the activation that a layer of ours applies last, as a layer of the same name unless the name is taken."""
        activation = getattr(layer, "activation", None)
        if activation in (None, keras.activations.linear):
            return None
        taken = not self._norms[layer][1].into or self._residual(layer)
        name = f"{layer.name}_activation" if taken else layer.name
        return layers.Activation(activation, name=name, dtype=layer.dtype_policy)


def _rescaling(layer: Any, step: Step) -> keras.Layer:
    """Return a batch normalization as one scale and shift, which loads without evennorm.

    In half precision it computes in float32, as batch normalization does: the mean may be large.
    """
    assert step.state is not None
    assert step.shape is not None
    affine = ScaleShift.of(step.state)
    rank = len(step.shape)
    axes = {axis % rank for axis in layer_axes(layer)}
    # Rescaling takes fewer than three axes for channels, whichever they are, under channels_first.
    shape = [1] * max(0, min(rank, 3) - (rank - 1)) * (rank > 2)
    shape += [int(step.shape[axis] or 1) if axis in axes else 1 for axis in range(1, rank)]
    dtype = "float32" if layer.compute_dtype in _HALVES else layer.dtype_policy
    scale, shift = (np.asarray(values).reshape(shape) for values in (affine.scale, affine.shift))
    return layers.Rescaling(scale, shift, name=layer.name, dtype=dtype)


def _summed(layer: Any, first: keras.Layer | None, activation: keras.Layer | None) -> Callable[..., Any]:
    """Return what remains of a layer of ours that is called with a residual: the addition, and its activation."""
    add = layers.Add(name=f"{layer.name}_add", dtype=layer.dtype_policy)

    def apply(inputs: Any, *_: Any, residual: Any = None, **__: Any) -> Any:
        y = inputs if first is None else first(inputs)
        y = y if residual is None else add([y, residual])
        return y if activation is None else activation(y)

    return apply
