"""Build a Keras 3 model from an old model, its arrays and its origin, with a report by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
from keras import layers

from evennorm.errors import InputError
from evennorm.tools.migrate import recurrent
from evennorm.tools.migrate.block import Block, Layout, Task
from evennorm.tools.migrate.matching import Matched
from evennorm.tools.migrate.models import declared_shape, dtype_of
from evennorm.tools.migrate.provenance import Provenance
from evennorm.tools.migrate.records import OldCall, OldLayer, OldModel, Ref
from evennorm.tools.migrate.translate import KNOWN, layout, translate

_RECURRENT = ("SimpleRNN", "LSTM", "GRU", "CuDNNLSTM", "CuDNNGRU", "ConvLSTM2D", "Bidirectional")


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer."""

    old: str
    """The layer's path in the old model."""
    old_class: str
    new: str
    """The classes that replaced it; empty where nothing did."""
    weights: int
    """How many arrays of the file it took."""
    converted: tuple[str, ...]
    """What was done to it, or to its weights, beyond new names."""
    assumed: tuple[str, ...]
    """What the file does not say, and what does not carry over."""


@dataclass
class Builder:
    """A builder of models that collects the reports."""

    origin: Provenance
    matched: Matched
    data_format: str | None
    partial: bool = False
    custom: Mapping[str, Any] = field(default_factory=dict)
    """Classes of the user's own, by their names in the file."""
    reports: list[LayerReport] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    step: Callable[[], None] = lambda: None
    """Called after each call of a layer, `OldModel.steps` times in all."""

    def model(self, old: OldModel) -> keras.Model:
        """Build the new model and set its weights.

        Raises:
            InputError: layers that cannot be migrated, unless `partial`.
        """
        return _Model(self, old).build()


@dataclass
class _Value:
    """A tensor of the new model, and whether its channel axis has been moved to the end."""

    tensor: Any
    moved: bool = False


class _Model:
    """One model, nested or not, while it is built."""

    def __init__(self, builder: Builder, old: OldModel):
        self.builder, self.old = builder, old
        self.values: dict[Ref, _Value] = {}
        self.blocks: dict[str, tuple[Block, bool]] = {}
        self.turned: dict[tuple[int, bool], Any] = {}
        self.applied: list[Any] = []
        self.missing: dict[str, str] = {}

    def build(self) -> keras.Model:
        old = self.old
        waiting = [(layer, index) for layer in old.layers for index in range(len(layer.calls))]
        while waiting:
            later = []
            for layer, index in waiting:
                call = layer.calls[index]
                if not self._lost(layer, call):
                    if not all(self._ready(ref) for ref in call.inputs):
                        later.append((layer, index))
                        continue
                    self._call(layer, index, call)
                self.builder.step()
            if len(later) == len(waiting):
                raise InputError(
                    f"the layers {', '.join(sorted({layer.name for layer, _ in later})[:4])} wait for each other; the "
                    "configuration is damaged"
                )
            waiting = later
        return self._finished()

    def _ready(self, ref: Ref) -> bool:
        return (ref[0], ref[1], 0) in self.values

    def _lost(self, layer: OldLayer, call: OldCall) -> bool:
        """Return whether the layer reads what could not be migrated."""
        source = next((self.missing[ref[0]] for ref in call.inputs if ref[0] in self.missing), None)
        if source is None:
            return False
        if layer.name not in self.missing:
            self._leave_out(layer, source, f"not exported: it depends on {source!r}")
        return True

    def _leave_out(self, layer: OldLayer, source: str, why: str) -> None:
        self.missing[layer.name] = source
        self.builder.left_out.append(layer.path)
        self.builder.reports.append(LayerReport(layer.path, layer.written, "", 0, (), (why,)))

    def _call(self, layer: OldLayer, index: int, call: OldCall) -> None:
        if layer.kind == "InputLayer":
            self.values[layer.name, index, 0] = _Value(self._input(layer))
            return
        inputs = [self._value(ref) for ref in call.inputs]
        if not inputs:
            raise InputError(f"the layer {layer.name!r} is called without an input; the configuration is damaged")
        try:
            outputs, moved = self._apply(layer, inputs, call)
        except InputError as error:
            if not self.builder.partial:
                raise
            self._leave_out(layer, layer.name, f"not exported: {error}")
            return
        for number, tensor in enumerate(outputs):
            self.values[layer.name, index, number] = _Value(tensor, moved and len(tensor.shape) > 2)

    def _value(self, ref: Ref) -> _Value:
        if ref not in self.values:
            raise InputError(
                f"output {ref[2]} of the layer {ref[0]!r} is read, and it has fewer; the configuration is damaged"
            )
        return self.values[ref]

    def _input(self, layer: OldLayer) -> Any:
        config = layer.config
        shape = declared_shape(config)
        if shape is None:
            raise InputError(f"the input {layer.name!r} has no batch_input_shape; the configuration is damaged")
        batch = shape[0] if _stateful(self.old) else None
        dtype = dtype_of(config)
        return keras.Input(batch_shape=(batch, *shape[1:]), dtype=dtype, name=layer.name)

    # One layer

    def _apply(self, layer: OldLayer, inputs: list[_Value], call: OldCall) -> tuple[list[Any], bool]:
        first = layer.name not in self.blocks
        if first:
            wanted = self._wanted(layer, inputs[0])
            self.blocks[layer.name] = self._translated(layer, [self._turned(x, wanted) for x in inputs], wanted)
        block, moved = self.blocks[layer.name]
        tensors = [self._turned(x, moved) for x in inputs]
        flags = {key: value for key, value in call.arguments.items() if key == "training" and isinstance(value, bool)}
        foreign = sorted(set(call.arguments) - {"training", "mask"})
        if foreign:
            raise InputError(f"{layer.name!r} is called with {', '.join(foreign)}, which migration does not know")
        outputs: Any = tensors if len(tensors) > 1 else tensors[0]
        for number, step in enumerate(block.layers):
            options = dict(flags) if number == len(block.layers) - 1 else {}
            if layer.kind in _RECURRENT and isinstance(outputs, list):
                outputs = step(outputs[0], initial_state=outputs[1:], **options)
            else:
                outputs = step(outputs, **options)
            self.applied.append(step)
        if first:
            _assign(layer, block)
        return (list(outputs) if isinstance(outputs, list | tuple) else [outputs]), moved

    def _wanted(self, layer: OldLayer, given: _Value) -> bool:
        """Return whether the layer takes its input with the channel axis moved to the end."""
        rank = len(given.tensor.shape)
        config = self._with_format(layer).config
        match layout(layer.kind, config, rank, given.moved):
            case Layout.MOVED:
                return rank > 2
            case Layout.KEPT:
                return given.moved
        return False

    def _with_format(self, layer: OldLayer) -> OldLayer:
        """Return the layer with the order of axes filled in, which some classes did not store."""
        unsaid = (
            layer.kind.startswith(("ZeroPadding", "UpSampling", "Cropping", "SpatialDropout")) or "Pooling" in layer.kind
        )
        unsaid = unsaid or layer.kind.startswith(("Conv", "SeparableConv", "DepthwiseConv", "LocallyConnected"))
        if not unsaid or layer.config.get("data_format") or layer.kind.endswith("1D") or not self.builder.data_format:
            return layer
        return replace(layer, config={**layer.config, "data_format": self.builder.data_format})

    def _turned(self, value: _Value, moved: bool) -> Any:
        """Return the tensor with its channel axis moved to the end, or back to the front."""
        if value.moved == moved or len(value.tensor.shape) < 3:
            return value.tensor
        key = (id(value.tensor), moved)
        if key not in self.turned:
            rank = len(value.tensor.shape)
            dims = (*range(2, rank), 1) if moved else (rank - 1, *range(1, rank - 1))
            name = value.tensor._keras_history.operation.name
            step = layers.Permute(dims, name=f"{name}_to_channels_{'last' if moved else 'first'}")
            self.turned[key] = step(value.tensor)
            self.applied.append(step)
        return self.turned[key]

    def _translated(self, layer: OldLayer, tensors: list[Any], moved: bool) -> tuple[Block, bool]:
        shapes = tuple(tuple(x.shape) for x in tensors)
        if layer.model is not None:
            model = self.builder.model(layer.model)
            model.name = layer.name
            if not layer.trainable or not layer.model.trainable:
                model.trainable = False
            return Block([model]), False
        stored = self._with_format(layer)
        task = Task(stored, self.builder.matched.of(layer), shapes, moved, self.builder.origin)
        if stored is not layer and len(shapes[0]) > 3:
            task.assumed.append(
                f"{stored.config['data_format'].replace('_', ' ')}, as the rest of the model: this class did not say"
            )
        masked = getattr(tensors[0], "_keras_mask", None) is not None
        backwards = layer.kind == "Bidirectional" or bool(layer.config.get("go_backwards"))
        if masked and backwards and self.builder.origin.releases[0] < (1, 2, 0) and not self.builder.origin.theano:
            task.assumed.append(
                "masks run backwards with their sequences, as on Theano and from 1.2 on; before, TensorFlow gave each "
                "sample the mask of another"
            )
        own = self.builder.custom.get(layer.written)
        if own is not None:
            block = _of_the_user(task, own)
        else:
            block = self._wrapped(task, masked) if layer.inner is not None else translate(task)
        kinds = ", ".join(type(x).__name__ if not isinstance(x, keras.Model) else "Model" for x in block.layers)
        self.builder.reports.append(
            LayerReport(layer.path, layer.written, kinds, len(task.arrays), tuple(task.converted), tuple(task.assumed))
        )
        return block, moved

    def _wrapped(self, task: Task, masked: bool) -> Block:
        inner = task.layer.inner
        assert inner is not None
        if inner.kind not in KNOWN and inner.written not in self.builder.custom and inner.model is None:
            raise InputError(f"{task.name!r} wraps {inner.name!r}, a {inner.written}, which migration does not know")
        if task.layer.kind == "Bidirectional":
            return recurrent.bidirectional(task, replace(task, layer=inner, converted=[], assumed=[]), masked)
        shape = (None, *task.shape[2:])
        if inner.model is not None:
            model = self.builder.model(inner.model)
            return Block([layers.TimeDistributed(model, **task.base)])
        inside = OldLayer(f"{task.name}_input", "", "InputLayer", "InputLayer", {"batch_input_shape": shape})
        called = replace(inner, calls=(OldCall(((inside.name, 0, 0),)),))
        small = OldModel(
            inner.name, (replace(inside, calls=(OldCall(()),)), called), ((inside.name, 0, 0),), ((inner.name, 0, 0),), True
        )
        before = len(self.builder.reports)
        made = _Model(_whole(self.builder), small)
        model = made.build()
        for report in self.builder.reports[before:]:
            task.converted.extend(report.converted)
            task.assumed.extend(report.assumed)
        taken = sum(report.weights for report in self.builder.reports[before:])
        del self.builder.reports[before:]
        task.converted.extend([f"{taken} weights in the wrapped {inner.written}"] if taken else [])
        alone = made.applied[0] if len(made.applied) == 1 else model
        return Block([layers.TimeDistributed(alone, **task.base)])

    # The whole

    def _finished(self) -> keras.Model:
        old = self.old
        inputs = [self.values[ref].tensor for ref in old.inputs]
        outputs = [self._turned(self.values[ref], False) for ref in old.outputs if ref in self.values]
        if self.missing:
            outputs += self._frontier(outputs)
            if not outputs or not self.applied:
                raise InputError(f"nothing of {old.name!r} can be exported: its first layers are not known")
        plain = old.sequential and len(inputs) == 1 and not self.missing
        if plain:
            return keras.Sequential([inputs[0], *self.applied], name=old.name)
        name = old.name
        return keras.Model(_one(inputs), _one(outputs), name=name)

    def _frontier(self, outputs: list[Any]) -> list[Any]:
        """Return what the missing layers would have read."""
        found, seen = [], {id(x) for x in outputs}
        for layer in self.old.layers:
            if layer.name in self.missing:
                for ref in (ref for call in layer.calls for ref in call.inputs):
                    if ref in self.values:
                        tensor = self._turned(self.values[ref], False)
                        if id(tensor) not in seen and self.values[ref].tensor is not None:
                            seen.add(id(tensor))
                            found.append(tensor)
        return found


def _whole(builder: Builder) -> Builder:
    """Return the same builder for what is inside a wrapper, which is migrated as a whole or not at all."""
    return Builder(
        builder.origin, builder.matched, builder.data_format, False, builder.custom, builder.reports, builder.left_out
    )


def _of_the_user(task: Task, own: Any) -> Block:
    """Make a layer of the user's own class, by the configuration in the file and with its arrays as they are."""
    foreign = ("batch_input_shape", "input_dtype", "input_shape", "build_config")
    config = {key: value for key, value in task.layer.raw.items() if key not in foreign}
    try:
        layer = own.from_config({**config, "name": task.name})
    except Exception as error:  # whatever the user's code raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{task.name!r}: {own.__module__}:{own.__qualname__} cannot be made from the configuration in the file "
            f"({reason}); let its from_config take what that holds"
        ) from error
    if not isinstance(layer, keras.layers.Layer):
        raise InputError(f"--custom names classes of Keras layers; {own.__module__}:{own.__qualname__} made a {type(layer)}")
    return Block([layer], [(layer, list(task.arrays))] if task.arrays else [])


def unknown_layers(model: OldModel, custom: Collection[str] = ()) -> list[str]:
    """Return a sentence for each class that has no counterpart, or whose code only the file has."""
    by_class: dict[str, list[str]] = {}
    for layer in model.leaves():
        if layer.kind not in KNOWN and layer.written not in custom:
            by_class.setdefault(layer.written, []).append(layer.path)
    return [_unknown(written, list(dict.fromkeys(paths))) for written, paths in by_class.items()]


def _unknown(written: str, paths: list[str]) -> str:
    why = "whose code is in the file and is never run" if written == "Lambda" else "which migration does not know"
    if len(paths) == 1:
        return f"{paths[0]!r} is a {written}, {why}"
    shown = ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return f"{shown} are of class {written}, {why}"


def _one(tensors: Sequence[Any]) -> Any:
    return tensors[0] if len(tensors) == 1 else list(tensors)


def _stateful(model: OldModel) -> bool:
    return any(bool(layer.config.get("stateful")) for layer in model.leaves())


def _assign(layer: OldLayer, block: Block) -> None:
    for target, arrays in block.values:
        set_weights(layer.name, target, arrays)


def set_weights(name: str, target: Any, arrays: Sequence[Any]) -> None:
    """Set the weights of one layer, checking their shapes; axes of size 1 may be missing or too many.

    Raises:
        InputError: arrays that do not fit.
    """
    wanted = [tuple(weight.shape) for weight in target.weights]
    given = [np.asarray(array) for array in arrays]
    other = "the file is damaged, or the architecture is another"
    if len(wanted) != len(given):
        raise InputError(
            f"{name!r} takes {len(wanted)} weights as a {type(target).__name__}, and the file gives {len(given)}; {other}"
        )
    for k, (shape, array) in enumerate(zip(wanted, given, strict=True)):
        if [n for n in shape if n != 1] != [n for n in array.shape if n != 1]:
            raise InputError(
                f"{name!r} takes a weight of shape {shape} as a {type(target).__name__}, and the file gives {array.shape}; "
                + other
            )
        given[k] = array.reshape(shape).astype("float32")
    target.set_weights(given)
