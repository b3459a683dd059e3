"""Run a Keras model call by call, so that its batch normalizations can be observed and changed.

Nested models are opened, so that every call of the graph can be stopped at. What has code of its own is one call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import Operation, ops
from keras.src import backend
from keras.src.models.functional import Functional

from evennorm.keras.graph import Node, calls, graph, is_model
from evennorm.keras.layer import BatchNormalization
from evennorm.keras.network import batch_norm_state
from evennorm.keras.roles import BATCH_NORMS
from evennorm.models.program import Call, Key, Observer
from evennorm.models.state import BatchNormState


def layers_by_path(model: keras.Model) -> dict[str, keras.Layer]:
    """Return every layer inside a model by the path where it is first met; shared ones once."""
    found: dict[str, keras.Layer] = {}
    seen: set[int] = set()

    def visit(holder: keras.Layer, prefix: str) -> None:
        for layer in holder._flatten_layers(include_self=False, recursive=False):
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            path, number = f"{prefix}{layer.name}", 2
            while path in found:
                path, number = f"{prefix}{layer.name}#{number}", number + 1
            found[path] = layer
            visit(layer, f"{path}/")

    visit(model, "")
    return found


@dataclass(frozen=True)
class LayerStatistics:
    """The moving statistics of one layer."""

    path: str
    layer: Any

    @property
    def frozen(self) -> bool:
        return not self.layer.trainable

    def state(self) -> BatchNormState:
        return batch_norm_state(self.layer, self.path)

    def write(self, mean: np.ndarray, variance: np.ndarray) -> None:
        deviation = np.sqrt(variance + self.layer.epsilon)
        values = {"moving_mean": mean, "moving_variance": variance}
        values |= {"renorm_mean": mean, "moving_stddev": deviation, "renorm_stddev": deviation}
        for variable, name in self._variables():
            if name in values:
                variable.assign(values[name].reshape(variable.shape).astype(_numpy_dtype(variable)))
            else:  # the part that rounding takes from the moving mean
                stored = _to_numpy(self.layer.moving_mean).astype("float64")
                variable.assign((mean.reshape(variable.shape) - stored).astype(_numpy_dtype(variable)))

    def snapshot(self) -> list[np.ndarray]:
        return [np.array(_to_numpy(variable)) for variable, _ in self._variables()]

    def restore(self, snapshot: list[np.ndarray]) -> None:
        for (variable, _), value in zip(self._variables(), snapshot, strict=True):
            variable.assign(value)

    def _variables(self) -> list[tuple[Any, str]]:
        names = ["moving_mean", "moving_variance"]
        if getattr(self.layer, "renorm", False):
            names += ["moving_stddev", "renorm_mean", "renorm_stddev"]
        found = [(getattr(self.layer, name), name) for name in names]
        bookkeeping = getattr(self.layer, "_bookkeeping", None) if isinstance(self.layer, BatchNormalization) else None
        return found + ([] if bookkeeping is None else [(bookkeeping.moving_mean_low, "low")])


@dataclass(frozen=True)
class HostTensor:
    """A tensor in host memory, with its mask."""

    value: np.ndarray
    mask: np.ndarray | None
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.value.nbytes + (0 if self.mask is None else self.mask.nbytes)


class Program:
    """The calls of a Keras model; see `models.program`.

    Example:
        >>> import keras, numpy as np
        >>> from evennorm.keras.program import Program
        >>> layers = [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization(name="bn")]
        >>> program = Program(keras.Sequential(layers))
        >>> [call.name for call in program.calls][1:], list(program.layers)
        (['bn'], ['bn'])
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self.layers: dict[str, LayerStatistics] = {}
        self.skipped: dict[str, str] = {}
        paths = layers_by_path(model)
        for path, layer in paths.items():
            if isinstance(layer, BATCH_NORMS):
                mode = getattr(layer, "mode", 0)
                if mode:
                    self.skipped[path] = f"mode {mode} has no moving statistics in use"
                elif layer.built:
                    self.layers[path] = LayerStatistics(path, layer)
                else:
                    self.skipped[path] = "it has never been called, and has no statistics yet"
        self._timed = [layer for layer in paths.values() if type(layer) is keras.layers.TimeDistributed]
        self._graph = graph(model) if _can_be_opened(model) else None
        self.calls: list[Call] = self._opened() if self._graph is not None else [self._whole()]

    # The calls

    def _opened(self) -> list[Call]:
        assert self._graph is not None
        reader = _Reader()
        reader.read(self.model, tuple(f"input {i}" for i in range(len(self._graph.inputs))), "")
        return reader.calls

    def _whole(self) -> Call:
        def run(values: Mapping[Key, Any]) -> Sequence[Any]:
            return (self.model(values["input"], training=False),)

        return Call(self.model.name, ("input",), ("output",), run)

    def begin(self, x: Any) -> dict[Key, Any]:
        if self._graph is None:
            return {"input": self._structured(x)}
        return {f"input {i}": value for i, value in enumerate(self._graph._standardize_inputs(self._structured(x)))}

    def verify(self, x: Any) -> None:
        """Do nothing: Keras runs the same graph itself."""

    def predict(self, x: Any) -> list[np.ndarray]:
        outputs = keras.tree.flatten(self.model.predict_on_batch(self._structured(x)))
        return [np.asarray(output) for output in outputs]

    def apply(self, x: Any) -> list[np.ndarray]:
        with self.running():
            return [_to_numpy(output) for output in keras.tree.flatten(self.model(self._structured(x), training=False))]

    def _structured(self, x: Any) -> Any:
        """Return arrays in the structure that the model takes; with another one Keras warns."""
        wanted = getattr(self._graph, "_inputs_struct", None)
        if isinstance(x, dict) and isinstance(wanted, list | tuple):
            return [x[tensor._keras_history.operation.name] for tensor in wanted]
        if isinstance(x, dict) and isinstance(wanted, keras.KerasTensor):
            return x[wanted._keras_history.operation.name]
        if isinstance(wanted, keras.KerasTensor) and isinstance(x, tuple):
            return x[0]
        if isinstance(wanted, list | tuple) and not isinstance(x, tuple | dict):
            return [x]
        if isinstance(wanted, dict) and not isinstance(x, dict):
            return dict(zip(wanted, x if isinstance(x, tuple) else (x,), strict=True))
        return list(x) if isinstance(x, tuple) else x

    # Watching

    @contextmanager
    def running(self) -> Iterator[None]:
        torch = sys.modules.get("torch") if keras.backend.backend() == "torch" else None
        with torch.no_grad() if torch else nullcontext(), ExitStack() as stack:
            for layer in self._timed:
                stack.enter_context(_replaced(layer, _folded(layer)))
            yield

    @contextmanager
    def watched(self, paths: Sequence[str], observer: Observer) -> Iterator[None]:
        with ExitStack() as stack:
            for path in paths:
                layer = self.layers[path].layer
                stack.enter_context(_replaced(layer, _observed(layer, path, observer)))
            yield

    # Keeping values

    def pack(self, value: Any) -> HostTensor | None:
        if not backend.is_tensor(value) or isinstance(value, keras.KerasTensor) or getattr(value, "is_sparse", False):
            return None
        try:
            mask = backend.get_keras_mask(value)
            dtype = backend.standardize_dtype(value.dtype)
            plain = ops.cast(value, "float32") if dtype == "bfloat16" else value
            return HostTensor(np.array(_to_numpy(plain)), None if mask is None else np.array(_to_numpy(mask)), dtype)
        except (TypeError, ValueError, NotImplementedError):  # ragged or sparse
            return None

    def unpack(self, packed: HostTensor) -> Any:
        value = ops.convert_to_tensor(packed.value, packed.dtype)
        if packed.mask is not None:
            backend.set_keras_mask(value, ops.convert_to_tensor(packed.mask))
        return value


@dataclass
class _Reader:
    """A list of the calls of a model and of those nested in it."""

    calls: list[Call] = field(default_factory=list)
    _times: int = 0

    def read(self, model: keras.Model, inputs: tuple[Key, ...], prefix: str) -> list[Key]:
        """Read a model whose inputs have these keys; return the keys of its outputs."""
        found = graph(model)
        self._times += 1
        number = self._times  # the same nested model may be called twice, on other values
        keys: dict[int, Key] = dict(zip(map(id, found.inputs), inputs, strict=True))
        for node in calls(model):
            if node.is_input or any(id(x) not in keys for x in node.input_tensors):
                continue
            operation = node.operation
            name = f"{prefix}{operation.name}"
            made: list[Key] = [(number, id(x)) for x in node.outputs]
            if _can_be_opened(operation) and _plain_call(node):
                inner = graph(operation)
                entered = tuple((number, id(node), i) for i in range(len(inner.inputs)))
                self._add(name, node, keys, entered, inner)
                made = self.read(operation, entered, f"{name}/")
            else:
                self._add(name, node, keys, tuple(made), None)
            keys.update(zip(map(id, node.outputs), made, strict=True))
        return [keys[id(x)] for x in found.outputs]

    def _add(self, name: str, node: Node, keys: dict[int, Key], outputs: tuple[Key, ...], inner: Functional | None) -> None:
        inputs = {id(x): keys[id(x)] for x in node.input_tensors}
        operation = node.operation

        def run(values: Mapping[Key, Any]) -> Sequence[Any]:
            args, kwargs = node.arguments.fill_in({own: values[key] for own, key in inputs.items()})
            if inner is not None:
                return inner._standardize_inputs(args[0])
            if "training" in getattr(operation, "_call_context_args", ()):
                kwargs["training"] = False  # as in predict, whatever mode the graph was built with
            return keras.tree.flatten(operation(*args, **kwargs))

        self.calls.append(Call(name, tuple(dict.fromkeys(inputs.values())), outputs, run))


def _can_be_opened(operation: Operation) -> bool:
    """Return whether a model does what its graph says, rather than what code of its own says."""
    if not is_model(operation):
        return False
    plain = keras.Sequential if isinstance(operation, keras.Sequential) else Functional
    if type(operation).call is not plain.call or "call" in vars(operation):
        return False
    return not isinstance(operation, keras.Sequential) or operation._functional is not None


def _plain_call(node: Node) -> bool:
    """Return whether a nested model gets only its inputs; masks that Keras fills in follow the values anyway."""
    given = [x for key, x in node.arguments.kwargs.items() if key not in ("mask", "training")]
    return len(node.arguments.args) == 1 and not keras.tree.flatten(given)


@contextmanager
def _replaced(layer: keras.Layer, call: Any) -> Iterator[None]:
    """Replace the layer's `call`, bypassing Keras's tracking of attributes."""
    vars(layer)["call"] = call
    try:
        yield
    finally:
        del vars(layer)["call"]


def _observed(layer: keras.Layer, path: str, observer: Observer) -> Any:
    original = layer.call
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        mask = given.get("mask") if given.get("mask") is not None else given.get("inputs_mask")
        x = given["inputs"]
        if backend.standardize_dtype(x.dtype) not in ("float32", "float64"):
            x = ops.cast(x, "float32")
        observer(path, _to_numpy(x), None if mask is None else _to_numpy(mask))
        return original(*args, **kwargs)

    return call


def _folded(layer: keras.layers.TimeDistributed) -> Any:
    """Return TimeDistributed with its time steps as samples: the same in inference, and one call of the inner layer."""
    original = layer.call

    def call(inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if keras.tree.is_nested(inputs) or len(inputs.shape) < 3:
            return original(inputs, training=training, mask=mask)
        samples, steps = inputs.shape[0], inputs.shape[1]
        kwargs: dict[str, Any] = {}
        if layer.layer._call_has_mask_arg and mask is not None:
            kwargs["mask"] = ops.reshape(mask, (samples * steps, *mask.shape[2:]))
        if layer.layer._call_has_training_arg:
            kwargs["training"] = training
        outputs = layer.layer.call(ops.reshape(inputs, (samples * steps, *inputs.shape[2:])), **kwargs)
        return ops.reshape(outputs, (samples, steps, *outputs.shape[1:]))

    return call


def _to_numpy(value: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(value))


def _numpy_dtype(variable: Any) -> str:
    dtype = backend.standardize_dtype(variable.dtype)
    return "float32" if dtype == "bfloat16" else dtype
