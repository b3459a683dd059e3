"""Load the arrays of an old weights file into the user's Keras 3 model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from evennorm.errors import InputError
from evennorm.keras.graph import is_model
from evennorm.tools.migrate import recurrent
from evennorm.tools.migrate.block import Task
from evennorm.tools.migrate.build import LayerReport, set_weights
from evennorm.tools.migrate.matching import Matched
from evennorm.tools.migrate.provenance import Provenance
from evennorm.tools.migrate.records import OldLayer, OldModel
from evennorm.tools.migrate.translate import KNOWN, translate


def as_old(model: keras.Model, path: str = "") -> OldModel:
    """Return the layers of a Keras 3 model as an old file would hold them, without calls: no weight depends on these."""
    layers = tuple(_layer(layer, path) for layer in model.layers)
    return OldModel(model.name, layers, (), (), isinstance(model, keras.Sequential), bool(model.trainable))


def _layer(layer: Any, path: str) -> OldLayer:
    name = layer.name
    own = f"{path}/{name}" if path else name
    kind = type(layer).__name__
    if is_model(layer):
        return OldLayer(name, own, kind, kind, {"name": name, "trainable": layer.trainable}, model=as_old(layer, own))
    inner = None
    if kind == "TimeDistributed":
        inner = _layer(layer.layer, own)
    elif kind == "Bidirectional":
        inner = _layer(layer.forward_layer, own)
    if layer.weights and inner is None and kind not in KNOWN:
        raise InputError(
            f"the architecture's layer {name!r} is a {kind}, and no release of Keras 1 or 2 stored weights for such a layer"
        )
    config = dict(layer.get_config())
    activation = config.get("activation")
    if isinstance(activation, dict):
        config["activation"] = None  # a function of the user's own: weights go in as they are
    return OldLayer(name, own, kind, kind, config, inner=inner)


def input_ranks(model: keras.Model, path: str = "") -> dict[str, int]:
    """Return the number of axes of each layer's input, by its path."""
    found: dict[str, int] = {}
    for layer in model.layers:
        own = f"{path}/{layer.name}" if path else layer.name
        if is_model(layer):
            found |= input_ranks(layer, own)
        elif isinstance(getattr(layer, "_inbound_nodes", None), list) and layer._inbound_nodes:
            given = layer._inbound_nodes[0].input_tensors
            found |= {own: len(given[0].shape)} if given else {}
    return found


def fill(
    model: keras.Model, old: OldModel, matched: Matched, origin: Provenance, step: Callable[[], None] = lambda: None
) -> list[LayerReport]:
    """Set the weights of every layer, converted as its class needs it.

    Args:
        step: called after each layer, `OldModel.steps` times in all.

    Raises:
        InputError: arrays that do not fit.
    """
    reports: list[LayerReport] = []
    for layer, described in zip(model.layers, old.layers, strict=True):
        if described.model is not None:
            reports += fill(layer, described.model, matched, origin, step)
        elif layer.weights:
            reports.append(_filled(layer, described, matched, origin, step))
        step()
    return reports


def _filled(layer: Any, described: OldLayer, matched: Matched, origin: Provenance, step: Callable[[], None]) -> LayerReport:
    target, source, shape = layer, described, tuple(layer.input.shape)
    while source.kind == "TimeDistributed" and source.inner is not None:
        target, source, shape = target.layer, source.inner, (shape[0], *shape[2:])
        if source.model is not None:
            inner = fill(target, source.model, matched, origin, step)
            notes = tuple(note for report in inner for note in report.converted)
            return LayerReport(
                described.path, described.written, "TimeDistributed", sum(x.weights for x in inner), notes, ()
            )
    task = Task(source, matched.of(source), (shape,), False, origin)
    if source.kind == "Bidirectional" and source.inner is not None:
        half = len(task.arrays) // 2
        inner_task = Task(source.inner, task.arrays, (shape,), False, origin, task.converted, task.assumed)
        arrays: list[Any] = [
            array for part in (task.arrays[:half], task.arrays[half:]) for array in recurrent.arrays_of(inner_task, part)
        ]
    else:
        block = translate(task)
        if len(block.values) != 1:
            raise InputError(f"{source.name!r} of class {source.written} has no weights that could be set one to one")
        arrays = block.values[0][1]
        if len(block.layers) > 1:
            task.assumed.append("the architecture's own padding counts; the old backend padded otherwise")
    set_weights(described.name, target, arrays)
    return LayerReport(
        described.path, described.written, type(layer).__name__, len(task.arrays), tuple(dict.fromkeys(task.converted)),
        tuple(task.assumed),
    )  # fmt: skip
