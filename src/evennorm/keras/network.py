"""Read a Keras model as a Network: every call of every layer, nested models and composed layers included."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
from keras import KerasTensor as Tensor
from keras import Operation, layers

from evennorm.errors import ArgumentError, first_line
from evennorm.keras.graph import Node, calls, data_inputs, graph, is_model
from evennorm.keras.layer import BatchNormalization
from evennorm.keras.roles import activation_of, channel_axis, has_bias, role_of
from evennorm.models.network import Network, Role, Step
from evennorm.models.state import BatchNormState

_Makers = dict[int, tuple[str, ...]]
"""Names of the steps that make a tensor, by its identity."""


@dataclass(frozen=True)
class _Mode:
    """The training mode that calls ask for: code that calls a layer decides it, a functional model's calls do not.

    In Keras 3 `fit` and `predict` pass their own mode to each layer of a functional model, whatever was
    said when it was called to build the model.
    """

    fixed: bool | None = None
    asked: bool | None = None
    from_code: bool = False

    def of_call(self, said: bool | None) -> _Mode:
        if said is None:
            return self
        return replace(self, fixed=said) if self.from_code else replace(self, asked=said)


def network(model: keras.Model) -> Network:
    """Read the calls of a model's layers and what flows between them.

    Models and layers that call others from their own code are read by running that code on symbols, in which nothing is
    computed and nothing of the model changes. Where that fails, or where there is no input shape yet, their layers are
    listed without what flows between them, and `gaps` says so.

    Raises:
        ArgumentError: no Keras model.

    Example:
        >>> import keras
        >>> from evennorm.keras.network import network
        >>> layers = [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization()]
        >>> model = keras.Sequential(layers)
        >>> [step.role.value for step in network(model).steps]
        ['input', 'linear', 'batch normalization']
    """
    if not isinstance(model, keras.Model):
        raise ArgumentError(f"a Keras model is needed; received {type(model).__name__}")
    reader = _Reader(getattr(model, "optimizer", None))
    with _unrecorded(model):
        outputs = reader.whole(model)
    optimizer = getattr(model, "optimizer", None)
    iterations = None if optimizer is None else int(keras.ops.convert_to_numpy(optimizer.iterations))
    return Network(model.name, tuple(reader.steps), tuple(outputs), tuple(reader.gaps), "keras", iterations)


class _Reader:
    """A list of steps. Symbolic tensors are told apart by their identity."""

    def __init__(self, optimizer: Any):
        self.steps: list[Step] = []
        self.gaps: list[str] = []
        self._optimizer = optimizer
        self._paths: dict[Operation, str] = {}
        self._taken: dict[str, int] = {}

    def whole(self, model: keras.Model) -> list[str]:
        """Read the model itself; return the names of the steps that make its outputs."""
        found = model if _is_graph(model) else None
        if found is None:
            found = self._traced_model(model)
        if found is None:
            self._listed(model, "")
            return []
        inner = graph(found)
        names: _Makers = {}
        for tensor in inner.inputs:
            layer = tensor._keras_history.operation
            names[id(tensor)] = self._add(layer, layer.name, (), tensor)
        return self._graph(found, names, "", _Mode(from_code=found is not model))

    def _graph(self, model: keras.Model, names: _Makers, prefix: str, mode: _Mode) -> list[str]:
        """Read a graph whose inputs are made by known steps; return the names of the steps that make its outputs."""
        for node in _without_masks(model):
            if not node.is_input:
                made = self._call(node, names, prefix, mode)
                names.update(zip(map(id, node.outputs), made, strict=True))
        return _unique(name for x in graph(model).outputs for name in names[id(x)])

    def _call(self, node: Node, names: _Makers, prefix: str, mode: _Mode) -> list[tuple[str, ...]]:
        """Read one call; return the steps that make each of its outputs."""
        operation = node.operation
        path = self._path(operation, prefix)
        given = data_inputs(node)
        inputs = _unique(name for x in given for name in names.get(id(x), ()))
        mode = mode.of_call(_mode_of_call(node))
        inner, from_code = None, False
        if is_model(operation) and _is_graph(operation):
            inner = operation
        elif _is_composed(operation):
            (inner, given), from_code = self._traced(operation, node.arguments, path), True
            if inner is None:
                self._listed(operation, f"{path}/")
        if inner is None:
            return [self._add(operation, path, inputs, node.outputs[0], mode)] * len(node.outputs)
        within = graph(inner)
        makers = {id(own): names.get(id(x), ()) for own, x in zip(within.inputs, given, strict=True)}
        self._graph(inner, makers, f"{path}/", replace(mode, from_code=from_code))
        return [makers[id(x)] for x in within.outputs]

    def _path(self, operation: Operation, prefix: str) -> str:
        """Return the path at which a layer is first met, so that a shared layer has one path."""
        if operation not in self._paths:
            self._paths[operation] = f"{prefix}{operation.name}"
        return self._paths[operation]

    def _add(
        self, operation: Operation, path: str, inputs: Sequence[str], output: Tensor | None, mode: _Mode | None = None
    ) -> tuple[str, ...]:
        """Append a step and return its name."""
        number = self._taken[path] = self._taken.get(path, 0) + 1
        name = path if number == 1 else f"{path}#{number}"
        role = role_of(operation)
        shape = None if output is None else tuple(output.shape)
        state = batch_norm_state(getattr(operation, "layer", operation), path) if role is Role.BATCH_NORM else None
        if state is not None and keras.backend.backend() == "jax":  # arrays on many devices count as one
            state = replace(state, synchronized=True)
        self.steps.append(
            Step(
                name=name,
                layer=path,
                kind=type(operation).__name__,
                role=role,
                inputs=tuple(inputs),
                handle=operation if isinstance(operation, keras.Layer) else None,
                shape=shape,
                state=state,
                activation=activation_of(operation),
                bias=has_bias(operation),
                channel_axis=None if shape is None else channel_axis(operation, len(shape)),
                trainable=bool(getattr(operation, "trainable", True)),
                training=None if mode is None else mode.fixed,
                asked=None if mode is None else mode.asked,
                rate=getattr(operation, "rate", None) if role is Role.DROPOUT else None,
                decayed=self._decayed(getattr(operation, "layer", operation)) if state is not None else (),
                dtype=getattr(operation, "compute_dtype", None),
            )
        )
        return (name,)

    def _decayed(self, layer: Any) -> tuple[str, ...]:
        """Return which parameters a regularizer of the layer, or the optimizer's weight decay, pulls to 0."""
        optimizer = self._optimizer
        decaying = optimizer is not None and getattr(optimizer, "weight_decay", None)
        found = []
        for name in ("gamma", "beta"):
            variable = getattr(layer, name, None)
            if variable is None or not variable.trainable:
                continue
            penalty = getattr(layer, f"{name}_regularizer", None)
            strength = getattr(penalty, "l2", 1.0) or getattr(penalty, "l1", 0.0)
            if (penalty is not None and float(strength)) or (decaying and optimizer._use_weight_decay(variable)):
                found.append(name)
        return tuple(found)

    # Layers that call others from their own code

    def _listed(self, holder: keras.Layer, prefix: str) -> None:
        """Add the layers in the order they were made, without what flows between them."""
        for layer in holder._layers:
            if isinstance(layer, keras.Model) or _is_composed(layer):
                self._listed(layer, f"{prefix}{layer.name}/")
            elif not isinstance(layer, layers.InputLayer):
                self._add(layer, self._path(layer, prefix), (), None)

    def _traced_model(self, model: keras.Model) -> keras.Model | None:
        """Return a subclassed model's code as a graph."""
        shapes = _built_shapes(model)
        if shapes is None:
            self._gap(model.name, model, "it has no input shape yet; call it on a batch, or give it a keras.Input")
            return None
        try:
            inputs = keras.tree.map_shape_structure(lambda shape: keras.Input(batch_shape=(None, *shape[1:])), shapes)
        except Exception as error:
            self._gap(model.name, model, first_line(error))
            return None
        return self._run(model, model.name, inputs, (inputs,), {})

    def _traced(self, layer: keras.Layer, arguments: Any, path: str) -> tuple[keras.Model | None, list[Tensor]]:
        """Return a composed layer's code as a graph over new inputs, and the tensors of the call that these stand for."""
        fresh: dict[int, Tensor] = {}
        given: list[Tensor] = []

        def symbol(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) not in fresh:
                fresh[id(x)] = keras.Input(batch_shape=x.shape, dtype=x.dtype)
                given.append(x)
            return fresh[id(x)]

        args, kwargs = keras.tree.map_structure(symbol, (arguments.args, dict(arguments.kwargs)))
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        return self._run(layer, path, list(fresh.values()), args, kwargs), given

    def _run(self, layer: keras.Layer, path: str, inputs: Any, args: Any, kwargs: Any) -> keras.Model | None:
        if not layer.built or any(not inner.built for inner in layer._flatten_layers()):
            self._gap(path, layer, "it is not built; call it on a batch first")
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return keras.Model(inputs, layer.call(*args, **kwargs))
        except Exception as error:  # its code may raise anything
            self._gap(path, layer, f"its code does not run on symbols ({first_line(error)})")
            return None

    def _gap(self, path: str, layer: keras.Layer, why: str) -> None:
        self.gaps.append(f"{path}: what flows between the layers of this {type(layer).__name__} is unknown: {why}")


def batch_norm_state(layer: Any, path: str) -> BatchNormState:
    """Return the settings and arrays of a batch-normalization layer of Keras or evennorm."""
    axis = layer.axis if isinstance(layer.axis, tuple | list) else (layer.axis,)
    ours = isinstance(layer, BatchNormalization)
    updates = getattr(layer, "num_batches", None)

    def array(name: str) -> np.ndarray | None:
        value = getattr(layer, name, None)
        return None if value is None else np.array(keras.ops.convert_to_numpy(value)).reshape(-1)

    return BatchNormState(
        name=path,
        epsilon=float(layer.epsilon),
        decay=None if layer.momentum is None else float(layer.momentum),
        gamma=array("gamma"),
        beta=array("beta"),
        mean=array("moving_mean"),
        variance=array("moving_variance"),
        axis=tuple(int(a) for a in axis),
        unbiased=ours and layer.unbiased_variance,
        updates=None if updates is None else int(keras.ops.convert_to_numpy(updates)),
        mode=layer.mode if ours else 0,
        synchronized=bool(getattr(layer, "synchronized", False)),
        virtual_batch_size=getattr(layer, "virtual_batch_size", None),
        renorm=bool(getattr(layer, "renorm", False)),
    )


@contextmanager
def _unrecorded(model: keras.Model) -> Iterator[None]:
    """Forget the calls that reading makes: a layer's `input` and `output` are those of its first or only call."""
    found = list(model._flatten_layers())
    before = [len(layer._inbound_nodes) for layer in found]
    try:
        yield
    finally:
        for layer, count in zip(found, before, strict=True):
            del layer._inbound_nodes[count:]


def _mode_of_call(node: Node) -> bool | None:
    """Return the mode that a call asks for; None where it asks for none, which Keras records as the layer's default."""
    said = node.arguments.kwargs.get("training")
    code = inspect.signature(node.operation.call).parameters.get("training")
    return None if said is None or code is None or said is code.default else bool(said)


def _is_graph(operation: Operation) -> bool:
    try:
        graph(operation)
    except ArgumentError:
        return False
    return True


def _is_composed(operation: Operation) -> bool:
    """Return whether a user's layer, or a model that is no graph, calls layers among which may be batch normalization."""
    if not isinstance(operation, keras.Layer) or isinstance(operation, layers.Wrapper):
        return False
    foreign = isinstance(operation, keras.Model) or not type(operation).__module__.startswith(("keras.", "evennorm."))
    return foreign and len(operation._flatten_layers(include_self=False)) > 0


def _without_masks(model: keras.Model) -> list[Node]:
    """Return the calls that make the outputs, rather than only a mask, in the order of execution."""
    every = calls(model)
    producer = {id(x): node for node in every for x in node.outputs}
    wanted, waiting = set(), [producer[id(x)] for x in graph(model).outputs]
    while waiting:
        node = waiting.pop()
        if node not in wanted:
            wanted.add(node)
            waiting += [producer[id(x)] for x in data_inputs(node)]
    return [node for node in every if node in wanted]


def _built_shapes(model: keras.Model) -> Any:
    shapes = getattr(model, "_build_shapes_dict", None)
    if not shapes:
        return None
    values = list(shapes.values())
    return values[0] if len(values) == 1 else None


def _unique(names: Any) -> list[str]:
    return list(dict.fromkeys(names))
