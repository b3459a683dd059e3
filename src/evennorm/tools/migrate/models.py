"""Read the JSON that Keras 1 and 2 wrote for a model, and resolve its calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from evennorm.errors import InputError
from evennorm.tools.migrate.names import in_words_of_keras_2
from evennorm.tools.migrate.records import OldCall, OldLayer, OldModel, Ref

MODELS = ("Model", "Functional", "Sequential", "Container")
WRAPPERS = ("TimeDistributed", "Bidirectional")


def read_model(config: Any, path: str = "") -> OldModel:
    """Read the model that a configuration describes: `{"class_name": .., "config": ..}`, or only what get_config() returned.

    Raises:
        InputError: anything else.
    """
    try:
        if isinstance(config, list):
            return _sequential(config, {}, path)
        if "class_name" not in config and "layers" in config:  # only model.get_config()
            return _functional(config, path) if "input_layers" in config else _sequential(config["layers"], config, path)
        kind, inner = config["class_name"], config["config"]
        if kind == "Sequential":
            own = inner if isinstance(inner, Mapping) else {}
            return _sequential(inner["layers"] if isinstance(inner, Mapping) else inner, own, path)
        if kind == "Graph":
            raise InputError("the Graph class was dropped in Keras 1.0; migration starts at the files of Keras 1.0")
        if kind in MODELS or (isinstance(inner, Mapping) and "input_layers" in inner):
            return _functional(inner, path)
    except InputError:
        raise
    except Exception as error:  # a damaged configuration may cause anything, RecursionError too
        raise InputError(
            f"the configuration is not one that Keras 1 or 2 wrote for a Sequential or a Model ({type(error).__name__}: "
            f"{error}); the file is damaged or of another program"
        ) from None
    raise InputError(
        f"models of class Sequential and Model can be migrated; received {kind!r}, whose code is not in the file"
    )


def _layer(entry: Mapping[str, Any], path: str, calls: tuple[OldCall, ...] = (), spare: str | None = None) -> OldLayer:
    """Read one layer; `spare` is its name where the file has none."""
    entry = _entry(entry)
    written, config = entry["class_name"], entry["config"]
    own = config if isinstance(config, Mapping) else {}
    stated = entry.get("name") or own.get("name")
    name = str(stated or spare or written.lower())
    if written in MODELS or written == "Functional":
        model = read_model({"class_name": written, "config": config}, _joined(path, name))
        words = {**own, "name": name}
        return OldLayer(name, _joined(path, name), written, written, words, calls, model=model, named=bool(stated))
    kind, words = in_words_of_keras_2(written, config)
    words["name"] = name
    inner = None
    if kind in WRAPPERS:
        inner = _layer(config["layer"], _joined(path, name))
    return OldLayer(name, _joined(path, name), kind, written, words, calls, inner=inner, named=bool(stated), raw=own)


def _entry(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an entry in the later form: Keras 0.3 wrote the class under "name" and the name under "custom_name"."""
    if "class_name" in entry:
        return entry
    return {"class_name": entry["name"], "config": {**entry, "name": entry.get("custom_name")}}


def _joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


class _Chain:
    """Layers called one after the other, as in a Sequential."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.layers: list[OldLayer] = []
        self.calls: dict[str, int] = {}
        self.inputs: list[Ref] = []

    def add(self, layer: OldLayer, inputs: tuple[Ref, ...]) -> Ref:
        """Call a layer, unless this call exists: a branch may be part of several merges. A layer whose name is known is
        called again, since Keras shared it.
        """
        call = OldCall(inputs)
        for position, known in enumerate(self.layers):
            if known.name == layer.name:
                if call in known.calls:
                    return layer.name, known.calls.index(call), 0
                self.layers[position] = _called(known, (*known.calls, call))
                break
        else:
            self.layers.append(_called(layer, (call,)))
        self.calls[layer.name] = self.calls.get(layer.name, -1) + 1
        ref = layer.name, self.calls[layer.name], 0
        if layer.kind == "InputLayer":
            self.inputs.append(ref)
        return ref

    def spare(self, kind: str) -> str:
        """Return a name for a layer without one: Keras 1 stored none for a Sequential in a Sequential."""
        return next(
            name for name in (kind, *(f"{kind}_{k}" for k in range(2, len(self.calls) + 3))) if name not in self.calls
        )

    def start(self, layer: OldLayer, more: Mapping[str, Any]) -> Ref:
        """Add an input before the first layer of a chain, and return it."""
        shape = input_shape(layer, more)
        name = f"{layer.name}_input"
        config = {"batch_input_shape": shape, "dtype": _input_dtype(layer), "name": name}
        return self.add(OldLayer(name, _joined(self.path, name), "InputLayer", "InputLayer", config), ())


def _called(layer: OldLayer, calls: tuple[OldCall, ...]) -> OldLayer:
    return replace(layer, calls=calls)


def _sequential(entries: list[Any], own: Mapping[str, Any], path: str) -> OldModel:
    chain = _Chain(path)
    last = _run(chain, entries, own)
    plain = len(chain.inputs) == 1 and all(len(layer.calls) == 1 for layer in chain.layers)
    name = str(own.get("name") or path.rsplit("/", 1)[-1] or "sequential_1")
    plain = plain and not any(len(call.inputs) > 1 for layer in chain.layers for call in layer.calls)
    return OldModel(name, tuple(chain.layers), tuple(chain.inputs), (last,), plain, bool(own.get("trainable", True)))


def _run(chain: _Chain, entries: Iterable[Any], own: Mapping[str, Any]) -> Ref:
    """Add the layers of a Sequential to a chain, and return its last output."""
    last: Ref | None = None
    for raw in entries:
        entry = _entry(raw)
        if entry["class_name"] == "Merge" and "layers" in entry["config"]:
            last = _merged(chain, entry)
            continue
        layer = _layer(entry, chain.path, spare=chain.spare(entry["class_name"].lower()))
        if layer.kind == "InputLayer":
            last = chain.add(layer, ())
            continue
        if last is None:
            last = chain.start(layer, own)
        last = chain.add(layer, (last,))
    if last is None:
        raise InputError("a Sequential model without layers predicts nothing; there is nothing to migrate")
    return last


def _merged(chain: _Chain, entry: Mapping[str, Any]) -> Ref:
    """Add the models before a Merge that begins a Sequential, whose layers Keras stored as if they were its own; return
    their outputs."""
    config = {key: value for key, value in entry["config"].items() if key != "layers"}
    branches = []
    for branch in entry["config"]["layers"]:
        kind, inner = branch["class_name"], branch["config"]
        if kind == "Sequential":
            branches.append(_run(chain, inner["layers"] if isinstance(inner, Mapping) else inner, {}))
        elif kind in MODELS:
            model = _functional(inner, chain.path)
            numbers: dict[tuple[str, int], Ref] = {}
            given = [name for name, _, _ in model.inputs]
            for layer in sorted(model.layers, key=lambda x: given.index(x.name) if x.name in given else len(given)):
                for index, call in enumerate(layer.calls):
                    ref = chain.add(layer, tuple((*numbers[name, node][:2], tensor) for name, node, tensor in call.inputs))
                    numbers[layer.name, index] = ref
            name, node, tensor = model.outputs[0]
            branches.append((*numbers[name, node][:2], tensor))
        else:
            layer = _layer(branch, chain.path)
            if layer.kind == "InputLayer":
                branches.append(chain.add(layer, ()))
            else:
                branches.append(chain.add(layer, (chain.start(layer, {}),)))
    layer = _layer({"class_name": "Merge", "config": config}, chain.path)
    return chain.add(layer, tuple(branches))


def input_shape(layer: OldLayer, own: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return the shape, batch axis included, that the first layer of a Sequential takes.

    Raises:
        InputError: the file does not say.
    """
    config, inside = layer.config, layer
    while inside.model is not None:  # a nested model says what it takes at its own input
        inside = next(x for x in inside.model.layers if x.name == inside.model.inputs[0][0])
    if inside is not layer:
        return declared_shape(inside.config)
    shape = declared_shape(config) or own.get("build_input_shape") or own.get("batch_input_shape")
    if shape is None and layer.kind == "Bidirectional" and layer.inner is not None:
        return input_shape(layer.inner, own)
    if shape is None and layer.kind == "Embedding":
        shape = (None, config.get("input_length"))
    if shape is None and config.get("input_dim"):
        sequence = layer.kind in ("SimpleRNN", "LSTM", "GRU", "Conv1D", "LocallyConnected1D") or "input_length" in config
        shape = (None, config.get("input_length"), config["input_dim"]) if sequence else (None, config["input_dim"])
    if shape is None:
        raise InputError(
            f"the first layer {layer.name!r} has no batch_input_shape in the configuration, and a model is built along its "
            'shapes; add it to the JSON, as in "batch_input_shape": [null, 32]'
        )
    return tuple(shape)


def declared_shape(config: Mapping[str, Any]) -> Any:
    """Return the input shape in a layer's configuration; None where it has none."""
    return config.get("batch_input_shape") or config.get("batch_shape")


def _input_dtype(layer: OldLayer) -> str:
    if layer.kind == "Embedding":
        return "int32"
    return dtype_of(layer.config)


def dtype_of(config: Mapping[str, Any]) -> str:
    """Return the dtype of an input; half and double precision are computed in float32 as the weights are."""
    found = config.get("dtype")
    if isinstance(found, Mapping):  # a dtype policy
        found = found.get("config", {}).get("name")
    return str(found) if isinstance(found, str) and found.startswith(("int", "uint", "bool")) else "float32"


def _functional(config: Mapping[str, Any], path: str) -> OldModel:
    entries = config["layers"]
    layers = [_layer(entry, path, _calls(entry.get("inbound_nodes") or [])) for entry in entries]
    layers = [layer if layer.calls else _called(layer, (OldCall(()),)) for layer in layers]
    inputs, outputs = _refs(config["input_layers"]), _refs(config["output_layers"])
    # A nested model's first call was the one that made it: the file counts the others from 1.
    used: dict[str, int] = {}
    for name, node, _ in [ref for layer in layers for call in layer.calls for ref in call.inputs] + list(outputs):
        used[name] = max(used.get(name, 0), node)
    shifted = {layer.name for layer in layers if layer.model is not None and used.get(layer.name, 0) >= len(layer.calls)}

    def resolved(ref: Ref) -> Ref:
        return (ref[0], ref[1] - 1, ref[2]) if ref[0] in shifted else ref

    layers = [
        _called(layer, tuple(OldCall(tuple(map(resolved, call.inputs)), call.arguments) for call in layer.calls))
        for layer in layers
    ]
    known = {layer.name: layer for layer in layers}
    for layer in layers:
        for call in layer.calls:
            for name, node, _ in call.inputs:
                if name not in known or not 0 <= node < len(known[name].calls):
                    raise InputError(
                        f"the layer {layer.name!r} takes call {node} of {name!r}, which the configuration lacks"
                    )
    for what, refs in (("input", inputs), ("output", tuple(map(resolved, outputs)))):
        for name, node, _ in refs:
            if name not in known or not 0 <= node < len(known[name].calls):
                raise InputError(f"the {what} of the model is call {node} of {name!r}, which the configuration lacks")
    name = str(config.get("name") or path.rsplit("/", 1)[-1] or "model_1")
    return OldModel(name, tuple(layers), inputs, tuple(map(resolved, outputs)), False, bool(config.get("trainable", True)))


def _refs(value: Any) -> tuple[Ref, ...]:
    """Parse `["name", 0, 0]`, or a list of such references."""
    if value and isinstance(value[0], str):
        value = [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return tuple((str(name), int(node), int(tensor)) for name, node, tensor, *_ in value)


def _calls(nodes: list[Any]) -> tuple[OldCall, ...]:
    calls = []
    for node in nodes:
        node = [node] if node and isinstance(node[0], str) else node
        arguments: dict[str, Any] = {}
        for item in node:
            if len(item) > 3 and item[3]:
                arguments |= item[3]
        calls.append(OldCall(_refs(node), arguments))
    return tuple(calls)
