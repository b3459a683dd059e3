"""Copy a Keras model layer by layer, with replacements and insertions."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import keras
import numpy as np
from keras import KerasTensor as Tensor
from keras import Operation
from keras.src.models.functional import Functional

from evennorm.errors import ArgumentError

Node = Any  # keras.src.ops.node.Node: one call of one operation


def is_model(operation: Operation) -> bool:
    """Return whether an operation is a Sequential or functional model, whose layers can be read."""
    return isinstance(operation, keras.Sequential | Functional)


def graph(model: keras.Model) -> Functional:
    """Return the graph of calls behind a Sequential or functional model.

    Raises:
        ArgumentError: anything else, whose layers are not written down anywhere but in its code; or no input shape yet.
    """
    if not isinstance(model, keras.Model):
        raise ArgumentError(f"a Keras model is needed; received {type(model).__name__}")
    plain = keras.Sequential if isinstance(model, keras.Sequential) else Functional
    if not is_model(model) or type(model).call is not plain.call or type(model).__init__ is not plain.__init__:
        raise ArgumentError(
            "only Sequential and functional models can be rewritten, since the layers of others are called from their "
            f"own code; received {model.name!r} of class {type(model).__name__}; use evennorm.keras.BatchNormalization "
            "in that code"
        )
    found = model._functional if isinstance(model, keras.Sequential) else model
    if found is None:
        raise ArgumentError(
            f"a model is rewritten along its shapes, and the Sequential model {model.name!r} has no input shape yet; "
            "add keras.Input(shape) as its first entry, or call model.build(input_shape)"
        )
    return found


def calls(model: keras.Model) -> list[Node]:
    """Return every call of the model in the order of execution, those of its inputs included."""
    by_depth = graph(model)._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]


def data_inputs(node: Node) -> list[Tensor]:
    """Return the tensors that a call reads as data: Keras records the masks that it fills in as arguments too."""
    keywords = {key: x for key, x in node.arguments.kwargs.items() if key != "mask" and not key.endswith("_mask")}
    return [x for x in keras.tree.flatten((node.arguments.args, keywords)) if isinstance(x, Tensor)]


def models_in(model: keras.Model) -> Iterator[keras.Model]:
    """Yield the model and those nested in it at any depth, each once."""
    waiting, seen = [model], set()
    while waiting:
        found = waiting.pop()
        if id(found) not in seen:
            seen.add(id(found))
            yield found
            waiting.extend(operation for operation in graph(found).operations if is_model(operation))


@dataclass(frozen=True)
class Insertions:
    """New layers by the call that they come before or after, in the order of the data."""

    before: Mapping[Node, Sequence[keras.Layer]] = field(default_factory=dict)
    after: Mapping[Node, Sequence[keras.Layer]] = field(default_factory=dict)

    def layers(self) -> Iterable[keras.Layer]:
        return [layer for side in (self.before, self.after) for layers in side.values() for layer in layers]


def rebuild(
    model: keras.Model, copy: Callable[[Operation], Operation | None], insertions: Insertions | None = None
) -> keras.Model:
    """Build a new model of new layers, with the state of the old ones.

    Nested models are rebuilt too, and what was shared stays shared. The original is left as it was, and the result is not
    compiled.

    Args:
        model: a Sequential or functional model.
        copy: returns the layer that replaces one of the old model, or None to leave it out; in functional models
            also a function that is called in its place. Weights are carried over by their order where both have as many,
            else by their names.
        insertions: layers to put before or after calls of the old model's layers.

    Raises:
        ArgumentError: a model that cannot be read, or a layer that its configuration does not reproduce.
    """
    insertions = insertions or Insertions()
    wanted = [(layer, layer.trainable) for layer in insertions.layers()]
    rebuilder = _Rebuilder(copy, insertions)
    new = rebuilder.model(model)
    pairs = [(model, new), *rebuilder.pairs()]
    for old, fresh in pairs:
        if not is_model(old):
            copy_state(old, fresh)
    _copy_trainable(pairs)
    for layer, trainable in wanted:
        layer.trainable = trainable
    return new


class _Rebuilder:
    """The copying of a model, with a record of what became of each layer, so that shared ones stay shared."""

    def __init__(self, copy: Callable[[Operation], Operation | None], insertions: Insertions):
        self._copy = copy
        self._insertions = insertions
        self._copies: dict[Operation, Operation | None] = {}

    def pairs(self) -> list[tuple[keras.Layer, keras.Layer]]:
        """Return old and new layers, a nested model before its layers."""
        kind = keras.Layer
        found = [(old, new) for old, new in self._copies.items() if isinstance(old, kind) and isinstance(new, kind)]
        return found[::-1]

    def model(self, model: keras.Model) -> keras.Model:
        return self._sequential(model) if isinstance(model, keras.Sequential) else self._functional(model)

    def _operation(self, operation: Operation) -> Operation | None:
        if operation not in self._copies:
            self._copies[operation] = self.model(operation) if is_model(operation) else self._copy(operation)
        return self._copies[operation]

    def _sequential(self, model: keras.Sequential) -> keras.Sequential:
        layers, entries = [], {id(layer) for layer in model.layers}
        for node in calls(model):
            if not node.is_input and id(node.operation) not in entries:
                continue  # an operation that computes a mask, which Keras will add again
            layer = None if node.is_input else self._operation(node.operation)
            layers += [
                *self._insertions.before.get(node, ()),
                *([layer] if layer else []),
                *self._insertions.after.get(node, ()),
            ]
        layers = layers or [keras.layers.Identity()]  # everything in the model was left out
        return type(model)([_new_input(model.inputs[0]), *layers], name=model.name)

    def _functional(self, model: keras.Model) -> keras.Model:
        found = graph(model)
        inputs = [_new_input(tensor) for tensor in found.inputs]
        tensors = dict(zip(map(id, found.inputs), inputs, strict=True))
        applied: dict[tuple[int, int], Tensor] = {}

        def apply(layers: Sequence[keras.Layer], tensor: Tensor) -> Tensor:
            """Call each layer once per tensor: two readers that ask for the same layer share the call, whose statistics move
            once a step."""
            for layer in layers:
                key = (id(layer), id(tensor))
                tensor = applied[key] = applied[key] if key in applied else layer(tensor)
            return tensor

        for node in calls(model):
            if not node.is_input:
                before = self._insertions.before.get(node, ())
                given = {id(x): tensors[id(x)] for x in node.input_tensors}
                given |= {id(x): apply(before, tensors[id(x)]) for x in data_inputs(node)}
                operation = self._operation(node.operation)
                if operation is None:
                    outputs = given[id(data_inputs(node)[0])]
                else:
                    args, kwargs = node.arguments.fill_in(given)
                    outputs = operation(*args, **_understood(operation, kwargs))
                tensors.update(zip(map(id, node.outputs), keras.tree.flatten(outputs), strict=True))
            for x in node.outputs:
                tensors[id(x)] = apply(self._insertions.after.get(node, ()), tensors[id(x)])
        struct = keras.tree.map_structure
        by_id = dict(zip(map(id, found.inputs), inputs, strict=True))
        return type(model)(
            struct(lambda x: by_id[id(x)], found.input), struct(lambda x: tensors[id(x)], found.output), name=model.name
        )


def _understood(operation: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that an operation takes: Keras records a mask and a mode that another class may not
    know."""
    if not isinstance(operation, keras.Layer):
        return kwargs
    known = inspect.signature(operation.call).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in known):
        return kwargs
    names = {each.name for each in known}
    return {key: value for key, value in kwargs.items() if key in names or value is not None}


def _new_input(tensor: Tensor) -> Tensor:
    layer = tensor._keras_history.operation  # the tensor has another name
    return keras.Input(
        batch_shape=tensor.shape, dtype=tensor.dtype, sparse=tensor.sparse, name=layer.name, optional=layer.optional
    )


def copy_layer(operation: Operation, **changes: Any) -> Operation:
    """Return a new layer of the same configuration except for `changes`; its state is not copied yet.

    Raises:
        ArgumentError: the layer's configuration does not reproduce it.
    """
    if isinstance(operation, keras.layers.Lambda):  # through a configuration, Keras would call its function unsafe
        return type(operation)(
            operation.function,
            output_shape=operation._output_shape,
            mask=operation.mask,
            arguments=operation.arguments,
            name=operation.name,
            dtype=operation.dtype_policy,
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The object being serialized includes a `lambda`")  # replaced below
            config = operation.get_config()
        activation = getattr(operation, "activation", None)
        if "activation" in config and callable(activation) and not isinstance(activation, keras.Layer):
            config["activation"] = activation  # the function itself, which need not be registered for saving
        return type(operation).from_config({**config, **changes})
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArgumentError(
            f"layers are copied through their configuration, and {operation.name!r} of class {type(operation).__name__} "
            f"cannot be: {reason}; give the class a get_config that returns all its arguments"
        ) from error


def copy_state(old: keras.Layer, new: keras.Layer) -> None:
    """Copy weights, the states of random seeds, and the tables of preprocessing layers."""
    if len(old.weights) == len(new.weights):
        pairs = list(zip(old.weights, new.weights, strict=True))
    else:
        by_name = {weight.name: weight for weight in old.weights}
        pairs = [(by_name[weight.name], weight) for weight in new.weights if weight.name in by_name]
    pairs += zip(_seeds(old), _seeds(new), strict=False)
    for source, target in pairs:
        target.assign(
            np.array(keras.ops.convert_to_numpy(source))
        )  # a copy: engines donate buffers, and share them with numpy
    if hasattr(old, "save_assets"):
        with TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
    if hasattr(new, "finalize_state"):
        new.finalize_state()


def _seeds(layer: keras.Layer) -> list[keras.Variable]:
    return [variable for variable in layer.variables if variable.path.endswith("seed_generator_state")]


def _copy_trainable(pairs: Iterable[tuple[keras.Layer, keras.Layer]]) -> None:
    """Set the flags from the outside to the inside, since setting one changes all inner layers."""
    models = [(old, new) for old, new in pairs if is_model(old)]
    layers = [(old, new) for old, new in pairs if not is_model(old)]
    for old, new in models:
        new.trainable = old.trainable
    for old, new in layers:
        for inner_old, inner_new in zip(old._flatten_layers(), new._flatten_layers(), strict=False):
            inner_new.trainable = inner_old.trainable
