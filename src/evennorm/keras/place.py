"""Copy a Keras model with batch normalization in one place of each hidden layer, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import KerasTensor as Tensor
from keras import Operation, layers

from evennorm.errors import ArgumentError
from evennorm.keras import norms
from evennorm.keras.graph import Insertions, Node, copy_layer, data_inputs, is_model, models_in, rebuild
from evennorm.keras.layer import BatchNormalization
from evennorm.keras.sites import (
    LINEAR,
    Sites,
    activation_name,
    behind_raw_layers,
    has_fused_activation,
    holds_indices,
    is_activation,
    is_normalization,
)

PLACEMENTS = ("none", "before", "after", "input")
Where = str | Callable[[keras.Layer], str | None] | Mapping[str, str | None]


def place(model: keras.Model, where: Where, drop_bias: bool = True, *, norm: str = "batch", **options: Any) -> keras.Model:
    """Return a copy of `model` with batch normalization in one place of each hidden layer, and nowhere else.

    Batch normalization that the model already has is taken out first, so that placements of one model can be compared; a
    layer whose bias that one stood in for gets its bias, zero. Everything else is copied with its weights, names, dtype
    policies and trainable flags. The original is left as it was, and the result is not compiled.

    A hidden layer is any that comes before the output layers: the last layers with weights on the way to each output,
    with all that follows them. Activations are those that Dense, EinsumDense and the convolutions apply themselves,
    activation layers, and `keras.activations` or `keras.ops` called on tensors; softmax is none, since what reads it needs
    probabilities. Recurrent and attention layers keep theirs inside and are left alone, as are wrappers such as
    TimeDistributed.

    Args:
        model: a Sequential or functional model with known input shapes; batch and spatial sizes may be unknown. Models
            nested in it are rewritten too. What is shared stays shared: a layer with weights that is called twice gets one
            normalization, called twice.
        where: "none"; "before", between a layer and its activation, for which an activation that the layer applies itself
            becomes a layer of its own; "after", after the activation; "input", as the first layer after every input of
            numbers, but for what must see raw values or tells which axis is the channel (preprocessing, masking, reshaping).
            Or a function that is called with each hidden layer and returns None, "before" (only for layers with or of an
            activation) or "after" (directly after any layer). Or a mapping from names of hidden layers to these words;
            `sites` lists those that have both places.
        drop_bias: leave out the bias of a layer whose output goes to the normalization only: beta does its work.
        norm: "batch", or "layer", "group" or "rms" for Keras's own layers in the same places: layer and RMS normalization of
            an image take all of its values, of other tensors the channels; group normalization takes at most 32 groups.
        **options: arguments for each new layer, such as `momentum` or `epsilon`. Its axis is 1 after
            channels-first layers, else -1; it is named after the layer that it normalizes, and takes over dtype
            policy and trainable flag.

    Raises:
        ArgumentError: a subclassed model, one without input shape, a placement that does not exist or that the model has no
            place for, layers that cannot be copied, batch normalization inside a layer where it cannot be taken out.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, section 3.2, for "before" and the redundant bias.

    Example:
        >>> import keras
        >>> from evennorm.keras import place
        >>> model = keras.Sequential(
        ...     [keras.Input((8,)), keras.layers.Dense(4, "relu", name="hidden"), keras.layers.Dense(2, name="out")]
        ... )
        >>> [layer.name for layer in place(model, "before").layers]
        ['hidden', 'hidden_bn', 'hidden_relu', 'out']
        >>> [layer.name for layer in place(model, "after").layers]
        ['hidden', 'hidden_bn', 'out']
    """
    if isinstance(where, Mapping):
        where = _by_name(model, where)
    if not callable(where) and where not in PLACEMENTS:
        raise ArgumentError(
            f"where is one of {', '.join(PLACEMENTS)}, or a function of a layer that returns None, 'before' or 'after', "
            f"or a mapping from layers' names to these; received {where!r}"
        )
    norms.check(norm, options)
    outer, *nested = [Sites(found) for found in models_in(model)]
    for sites in (outer, *nested):
        _refuse_hidden_normalization(sites)
    plan = _Plan(where, norm, options)
    output_part = outer.output_part()
    for sites in (outer, *nested):
        plan.read(sites, output_part)
    if where == "input":
        plan.normalize_inputs(outer)
    if where in PLACEMENTS[1:] and not plan.inserted:
        raise ArgumentError(f"model {model.name!r} has no place for where={where!r}: {_NO_PLACE[where]}")
    plan.settle_biases([outer, *nested], drop_bias)
    return rebuild(model, plan.copy, Insertions(plan.before, plan.after))


def sites(model: keras.Model) -> list[str]:
    """Return the names of the hidden layers that have a place before and after an activation, in the order of execution.

    Example:
        >>> import keras
        >>> from keras.layers import Dense, ReLU
        >>> layers = [Dense(4, name="hidden"), ReLU(name="act"), Dense(4, "tanh", name="next"), Dense(2, name="out")]
        >>> sites(keras.Sequential([keras.Input((8,)), *layers]))
        ['act', 'next']
    """
    return [layer.name for layer in _hidden(model) if has_fused_activation(layer) or is_activation(layer)]


def _hidden(model: keras.Model) -> list[keras.Layer]:
    """Return the hidden layers of a model and of those nested in it, each once."""
    outer, *nested = [Sites(found) for found in models_in(model)]
    output_part = outer.output_part()
    found: dict[keras.Layer, None] = {}
    for each in (outer, *nested):
        for node in each.calls:
            operation = node.operation
            if isinstance(operation, keras.Layer) and not (
                node.is_input or operation in output_part or is_model(operation) or is_normalization(operation)
            ):
                found[operation] = None
    return list(found)


def _by_name(model: keras.Model, where: Mapping[str, str | None]) -> Callable[[keras.Layer], str | None]:
    names = [layer.name for layer in _hidden(model)]
    unknown = [name for name in where if name not in names]
    if unknown:
        raise ArgumentError(
            f"the names are those of hidden layers, {', '.join(names) or 'of which there are none'}; received {unknown[0]!r}"
        )
    return lambda layer: where.get(layer.name)


_HIDDEN = (
    "none of its hidden layers has an activation that can be told apart (those inside recurrent, attention, wrapper and "
    "custom layers cannot), and output layers are not touched; use where='input', or a function that names layers to "
    "normalize 'after'"
)
_NO_PLACE = {
    "before": _HIDDEN,
    "after": _HIDDEN,
    "input": "none of its inputs holds floating-point values of its own (those that go into an Embedding are indices); "
    "use 'before' or 'after'",
}


class _Plan:
    """What to insert around which call, and what to change in which layer."""

    def __init__(self, where: str | Callable[[keras.Layer], str | None], norm: str, options: dict[str, Any]):
        self.before: dict[Node, list[keras.Layer]] = {}
        self.after: dict[Node, list[keras.Layer]] = {}
        self.inserted: dict[Any, keras.Layer] = {}
        self._where = where
        self._norm = norm
        self._options = options
        self._answers: dict[Operation, str | None] = {}
        self._changes: dict[Operation, dict[str, Any]] = {}
        self._activations: dict[Operation, keras.Layer] = {}
        self._left: dict[Operation, str] = {}
        """Names of the activations that stay where a normalization that applied one is taken out."""
        self._normalized: set[int] = set()
        self._names: dict[int, set[str]] = {}

    # Reading

    def read(self, sites: Sites, output_part: set[Operation]) -> None:
        """Decide for every hidden layer of one model."""
        for node in sites.calls:
            operation = node.operation
            if isinstance(operation, BatchNormalization) and not is_normalization(operation):
                self._name_activation(sites, node)
            if node.is_input or operation in output_part or is_model(operation) or is_normalization(operation):
                continue
            if operation not in self._answers:
                self._answers[operation] = self._ask(operation)
            if self._answers[operation] == "before":
                self._put_before(sites, node)
            elif self._answers[operation] == "after":
                self._put_after(sites, node)

    def _ask(self, operation: Operation) -> str | None:
        has_activation = has_fused_activation(operation) or is_activation(operation)
        if not callable(self._where):
            return self._where if has_activation and self._where in ("before", "after") else None
        if not isinstance(operation, keras.Layer):
            return None
        answer = self._where(operation)
        if answer not in (None, "before", "after"):
            raise ArgumentError(
                f"the function given as where returns None, 'before' or 'after'; it returned {answer!r} for "
                f"{operation.name!r}"
            )
        if answer == "before" and not has_activation:
            raise ArgumentError(
                f"'before' is the place between a layer and its activation, and {operation.name!r} of class "
                f"{type(operation).__name__} has none of its own; return 'after' for it, or 'before' for the activation "
                "layer"
            )
        return answer

    def _put_before(self, sites: Sites, node: Node) -> None:
        operation = node.operation
        if has_fused_activation(operation):
            activation = self._split(sites, operation)
            self.after[node] = [self._normalization(sites, node.outputs[0], operation, inside=True), activation]
        else:
            _, made = sites.source(data_inputs(node)[0])
            if id(made) not in self._normalized:
                self.before[node] = [self._normalization(sites, made, operation)]

    def _put_after(self, sites: Sites, node: Node) -> None:
        if len(node.outputs) != 1:
            raise ArgumentError(
                f"batch normalization takes one tensor, and {node.operation.name!r} of class "
                f"{type(node.operation).__name__} returns {len(node.outputs)}; return None for it"
            )
        self._normalized.add(id(node.outputs[0]))
        self.after[node] = [self._normalization(sites, node.outputs[0], node.operation)]

    def normalize_inputs(self, sites: Sites) -> None:
        """Insert a normalization after each input of floating-point numbers."""
        for tensor in sites.model.inputs:
            node, tensor = behind_raw_layers(sites, tensor)
            if keras.backend.is_float_dtype(tensor.dtype) and not tensor.sparse and not holds_indices(sites, tensor):
                self.after[node] = [self._normalization(sites, tensor, node.operation)]

    # Making layers

    def _normalization(self, sites: Sites, tensor: Tensor, site: Operation, inside: bool = False) -> keras.Layer:
        """Return the layer for a tensor; with `inside`, for the value before the activation that the layer itself
        applies."""
        origin, found = sites.origin(tensor)
        key = (found, inside)
        if key not in self.inserted:
            base = origin if origin is not None else site
            name = self._new_name(sites, f"{base.name}_{'bn' if self._norm == 'batch' else self._norm}")
            axis = sites.channel_axis(tensor)
            self.inserted[key] = norms.made(self._norm, tensor, axis, name, **_manner(base), **self._options)
        return self.inserted[key]

    def _split(self, sites: Sites, operation: Operation) -> keras.Layer:
        """Return the activation of a linear layer as a layer of its own, with the penalty on the layer's output."""
        if operation not in self._activations:
            name = self._new_name(sites, f"{operation.name}_{activation_name(operation.activation)}")
            if isinstance(operation.activation, keras.Layer):
                activation = copy_layer(operation.activation, name=name)
            else:
                activation = layers.Activation(operation.activation, name=name, **_manner(operation))
            if operation.activity_regularizer is not None:
                activation.activity_regularizer = operation.activity_regularizer
            self._activations[operation] = activation
            self._changes[operation] = {"activation": "linear", "activity_regularizer": None}
        return self._activations[operation]

    def _name_activation(self, sites: Sites, node: Node) -> None:
        """Name the activation of a normalization after the layer before both, as if that layer had been split."""
        operation = node.operation
        if operation not in self._left:
            origin, _ = sites.origin(data_inputs(node)[0])
            base = operation if origin is None else origin
            self._left[operation] = self._new_name(sites, f"{base.name}_{activation_name(operation.activation)}")

    def _new_name(self, sites: Sites, name: str) -> str:
        """Return `name`, or `name_2` where the model keeps a layer of that name."""
        kept = {node.operation.name for node in sites.calls if not is_normalization(node.operation)}
        taken = self._names.setdefault(id(sites.model), kept)
        unique, number = name, 1
        while unique in taken:
            number += 1
            unique = f"{name}_{number}"
        taken.add(unique)
        return unique

    # Biases

    def settle_biases(self, all_sites: list[Sites], drop_bias: bool) -> None:
        """Add and remove biases of linear layers by what now follows them."""
        uses: dict[Operation, list[tuple[Sites, Node]]] = {}
        for sites in all_sites:
            for node in sites.calls:
                if type(node.operation) in LINEAR:
                    uses.setdefault(node.operation, []).append((sites, node))
        beta_replaces = drop_bias and norms.has_beta(self._norm, self._options)
        for operation, places in uses.items():
            linear = operation in self._activations or not has_fused_activation(operation)
            normalized = linear and all(self._is_normalized(sites, node) for sites, node in places)
            was_normalized = not has_fused_activation(operation) and all(
                sites.directly_normalized(node.outputs[0]) for sites, node in places
            )
            if normalized and beta_replaces:
                self._changes.setdefault(operation, {}).update(_without_bias(operation))
            elif was_normalized and not normalized and not isinstance(operation, layers.EinsumDense):
                self._changes.setdefault(operation, {})["use_bias"] = True

    def _is_normalized(self, sites: Sites, node: Node) -> bool:
        """Return whether everything that reads a linear layer's output, or what will remain of it, reads it through a
        normalization."""
        if self.after.get(node):
            return any(self.after[node][0] is layer for layer in self.inserted.values())
        readers = sites.readers(node.outputs[0])
        return bool(readers) and all(self.before.get(reader) for reader in readers) and not sites.is_output(node.outputs[0])

    def copy(self, operation: Operation) -> Operation | None:
        """Return what replaces a layer of the old model."""
        if is_normalization(operation):
            return None
        if isinstance(operation, BatchNormalization):  # only its activation is left
            return layers.Activation(operation.activation, name=self._left[operation], dtype=operation.dtype_policy)
        return copy_layer(operation, **self._changes.get(operation, {}))


def _without_bias(operation: Operation) -> dict[str, Any]:
    """Return the change that removes the bias of a linear layer; none where it has more values than there are channels."""
    if isinstance(operation, layers.EinsumDense):
        return {"bias_axes": None} if operation.bias is not None and len(operation.bias.shape) == 1 else {}
    return {"use_bias": False}


def _manner(operation: Operation) -> dict[str, Any]:
    """Return dtype policy and trainable flag that a new layer takes over from the one it belongs to."""
    if not isinstance(operation, keras.Layer):
        return {}
    policy = operation.dtype_policy
    quantized = getattr(policy, "quantization_mode", None) is not None
    return {"dtype": operation.compute_dtype if quantized else policy, "trainable": operation.trainable}


def _refuse_hidden_normalization(sites: Sites) -> None:
    for node in sites.calls:
        operation = node.operation
        if isinstance(operation, BatchNormalization) and len(data_inputs(node)) > 1:
            given = ", ".join(sorted(node.arguments.kwargs)) or "several tensors"
            raise ArgumentError(
                f"batch normalization is taken out before it is placed anew, and {operation.name!r} is called with {given}, "
                "which nothing else could take; write the addition as a layer of its own"
            )
        if not isinstance(operation, keras.Layer) or is_model(operation) or is_normalization(operation):
            continue
        kinds = (layers.BatchNormalization, BatchNormalization)
        inner = [x for x in operation._flatten_layers(include_self=False) if isinstance(x, kinds)]
        if inner:
            raise ArgumentError(
                f"batch normalization is taken out before it is placed anew, and that cannot be done inside "
                f"{operation.name!r} of class {type(operation).__name__}, which holds {inner[0].name!r}; put its "
                "layers into the model itself"
            )
