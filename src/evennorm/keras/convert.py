"""A Keras model goes in; a copy with Keras's batch normalization exchanged for evennorm's comes out, and the way back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import Operation

from evennorm.errors import ArgumentError
from evennorm.keras import legacy
from evennorm.keras.graph import calls, copy_layer, models_in, rebuild
from evennorm.keras.layer import BatchNormalization

OURS = (BatchNormalization, legacy.BatchNormalization)
THEIRS = keras.layers.BatchNormalization


def convert(model: keras.Model) -> keras.Model:
    """A copy of `model` with every `keras.layers.BatchNormalization` exchanged for `evennorm.keras.BatchNormalization`.

    Nested models and layers that wrap others are converted too. Shared layers stay shared; names, weights, trainable flags
    and dtype policies stay as they are, and the outputs are the same within rounding. Classes derived from Keras's layer
    may compute anything and are copied as they are. A compiled model gives a model compiled alike, its optimizer with its
    state, so that training goes on where it was. A model without batch normalization is copied.

    Args:
        model: a Sequential or functional model with known input shapes.

    Raises:
        ArgumentError: a subclassed model; layers that cannot be copied, or that make a batch normalization in their code.

    Example:
        >>> import keras
        >>> from evennorm.keras import convert
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn"), keras.layers.Dense(2)])
        >>> type(convert(model).get_layer("bn")).__module__
        'evennorm.keras.layer'
    """
    return _exchanged(model, (THEIRS,), BatchNormalization, lambda config, name: config)


def revert(model: keras.Model) -> keras.Model:
    """A copy of `model` with every `evennorm.keras.BatchNormalization` exchanged for `keras.layers.BatchNormalization`.

    The way back from `convert`, with the same promises, for models that have to run without evennorm.

    Raises:
        ArgumentError: as for `convert`; and a layer that does what Keras's cannot, such as `mode=2`, `activation=`, several
            axes or a residual input.

    Example:
        >>> import keras
        >>> from evennorm.keras import BatchNormalization, revert
        >>> model = keras.Sequential([keras.Input((4,)), BatchNormalization(name="bn"), keras.layers.Dense(2)])
        >>> isinstance(revert(model).get_layer("bn"), keras.layers.BatchNormalization)
        True
    """
    for inner in models_in(model):
        for node in calls(inner):
            arguments = [*node.arguments.args, *(x for key, x in node.arguments.kwargs.items() if key == "residual")]
            if isinstance(node.operation, OURS) and sum(isinstance(x, keras.KerasTensor) for x in arguments) > 1:
                raise ArgumentError(
                    f"keras.layers.BatchNormalization takes no residual, and {node.operation.name!r} is called with one; "
                    "write the addition as a layer of its own"
                )
    return _exchanged(model, OURS, THEIRS, _keras_config)


def _keras_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration of one of our layers as one of Keras's.

    Raises:
        ArgumentError: Keras's layer has no word for it.
    """
    axis = config["axis"]
    axis = axis[0] if isinstance(axis, list | tuple) and len(axis) == 1 else axis
    known = set(THEIRS(name="known").get_config()) | {"synchronized"}
    foreign = {key: value for key, value in config.items() if key not in known}
    if not isinstance(axis, int):
        foreign["axis"] = axis
    if config["momentum"] is None:
        foreign["momentum"] = None
    if foreign:
        given = ", ".join(f"{key}={value!r}" for key, value in foreign.items())
        raise ArgumentError(
            f"keras.layers.BatchNormalization cannot do what {name!r} does with {given}; keep that layer, "
            + ("write the activation as a layer of its own" if set(foreign) == {"activation"} else "or build it without")
        )
    return {**config, "axis": axis}


Translation = Callable[[dict[str, Any], str], dict[str, Any]]


def _exchanged(
    model: keras.Model, old: tuple[type[keras.Layer], ...], new: type[keras.Layer], translate: Translation
) -> keras.Model:
    """`model` with layers of exactly the classes `old` made into `new`."""
    headers = [_header(kind) for kind in old]

    def copy(operation: Operation) -> Operation:
        if type(operation) in old:
            return new.from_config(translate(operation.get_config(), operation.name))
        if not isinstance(operation, keras.Layer) or not _holds(operation, old):
            return copy_layer(operation)
        config = operation.get_config()
        rewritten = _rewritten(config, headers, new, translate)
        return copy_layer(operation, **{key: value for key, value in rewritten.items() if value != config[key]})

    result = rebuild(model, copy)
    left = [layer for layer in result._flatten_layers() if type(layer) in old]
    if left:
        holder = next(
            x for x in result._flatten_layers() if left[0] in x._flatten_layers(include_self=False, recursive=False)
        )
        raise ArgumentError(
            f"layers are exchanged through their configuration, and {holder.name!r} of class {type(holder).__name__} makes "
            f"its {left[0].name!r} in its own code; change it there, or hand the layer in and return it from get_config"
        )
    _compile_alike(model, result)
    return result


def _holds(layer: keras.Layer, kinds: tuple[type[keras.Layer], ...]) -> bool:
    return any(type(inner) in kinds for inner in layer._flatten_layers(include_self=False))


def _rewritten(config: Any, headers: list[dict[str, Any]], new: type[keras.Layer], translate: Translation) -> Any:
    """A configuration with the batch normalizations inside it exchanged."""
    if isinstance(config, list | tuple):
        return type(config)(_rewritten(item, headers, new, translate) for item in config)
    if not isinstance(config, dict):
        return config
    if any(header.items() <= config.items() for header in headers):
        inner = translate(config["config"], config["config"]["name"])
        return {**config, **_header(new), "config": inner}
    return {key: _rewritten(value, headers, new, translate) for key, value in config.items()}


def _header(kind: type[keras.Layer]) -> dict[str, Any]:
    serialized = keras.saving.serialize_keras_object(kind(name="header"))
    return {key: serialized[key] for key in ("module", "class_name", "registered_name")}


def _compile_alike(model: keras.Model, copy: keras.Model) -> None:
    """Compiles `copy` as `model` is compiled, and lets its optimizer go on where that of `model` stands."""
    if not model.compiled:
        return
    try:
        copy.compile_from_config(model.get_compile_config())
    except (TypeError, ValueError) as error:
        warnings.warn(
            f"the copy of {model.name!r} is not compiled, since its loss, metrics or optimizer cannot be read from their "
            f"configuration ({str(error).strip().splitlines()[0]}); compile it again",
            stacklevel=3,
        )
        return
    for source, target in zip(model.optimizer.variables, copy.optimizer.variables, strict=False):
        target.assign(np.array(keras.ops.convert_to_numpy(source)))
