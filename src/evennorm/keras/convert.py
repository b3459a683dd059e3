"""Replace Keras's batch normalization in a model by evennorm's, and revert it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import Operation

from evennorm.errors import ArgumentError
from evennorm.keras import initializers, legacy
from evennorm.keras.graph import calls, copy_layer, models_in, rebuild
from evennorm.keras.layer import BatchNormalization

OURS = (BatchNormalization, legacy.BatchNormalization)
THEIRS = keras.layers.BatchNormalization


def convert(model: keras.Model) -> keras.Model:
    """Return a copy of `model` with every `keras.layers.BatchNormalization` exchanged for
    `evennorm.keras.BatchNormalization`.

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
    return _exchanged(model, (THEIRS,), BatchNormalization, lambda config, name, layer: config)


def revert(model: keras.Model) -> keras.Model:
    """Return a copy of `model` with every `evennorm.keras.BatchNormalization` exchanged for
    `keras.layers.BatchNormalization`.

    The way back from `convert`, with the same promises, for models that have to run without evennorm.

    Raises:
        ArgumentError: as for `convert`; and a layer that does what Keras's cannot, such as `mode=2`, `activation=`, several
            axes or a residual input, or that is one of evennorm's other classes and functions for models of Keras 1.

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
    result = _exchanged(model, OURS, THEIRS, _keras_config)
    for layer in result._flatten_layers():
        if not isinstance(layer, keras.Model) and (foreign := _of_evennorm(layer)):
            raise ArgumentError(
                f"revert returns a model that Keras loads without evennorm, and Keras does not know {foreign} of "
                f"{layer.name!r}; keep evennorm for this model, or replace it there"
            )
    return result


def _of_evennorm(layer: keras.Layer) -> str | None:
    """Return the class or function of evennorm that a layer is, or names in its configuration."""
    if type(layer).__module__.startswith("evennorm."):
        return f"{type(layer).__module__}.{type(layer).__name__}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning is about lambdas, which belong to no package
        try:
            return _named_in(layer.get_config())
        except Exception:  # such a class cannot be saved with evennorm either
            return None


def _named_in(config: Any) -> str | None:
    if isinstance(config, str):
        return config if config.startswith("evennorm>") else None
    if isinstance(config, dict):
        if str(config.get("module") or "").startswith("evennorm."):
            return f"{config['module']}.{config.get('class_name')}"
        config = list(config.values())
    if not isinstance(config, list | tuple):
        return None
    return next(filter(None, map(_named_in, config)), None)


def _keras_config(config: dict[str, Any], name: str, layer: keras.Layer | None) -> dict[str, Any]:
    """Return the configuration of one of our layers as one that Keras alone can read.

    Raises:
        ArgumentError: Keras's layer has no argument for it.
    """
    axis = config["axis"]
    axis = axis[0] if isinstance(axis, list | tuple) and len(axis) == 1 else axis
    known = set(THEIRS(name="known").get_config()) | {"synchronized"}
    foreign = {key: value for key, value in config.items() if key not in known}
    if not isinstance(axis, int):
        foreign["axis"] = axis
    if config["momentum"] is None:
        foreign["momentum"] = None
    backend = keras.backend.backend()
    if config["synchronized"] and backend == "jax":
        config = {**config, "synchronized": False}  # statistics are of the whole batch there, and Keras refuses the argument
    elif config["synchronized"] and backend != "tensorflow":
        foreign["synchronized"] = True
    if foreign:
        given = ", ".join(f"{key}={value!r}" for key, value in foreign.items())
        raise ArgumentError(
            f"keras.layers.BatchNormalization cannot do what {name!r} does with {given}; keep that layer, "
            + ("write the activation as a layer of its own" if set(foreign) == {"activation"} else "or build it without")
        )
    return {**config, "axis": axis, **(_initializers(layer) if layer is not None and layer.built else {})}


def _initializers(layer: keras.Layer) -> dict[str, Any]:
    """Return initializers of Keras's own for those of a layer that are Keras 1's, by the arguments' names."""
    found = {}
    for name in ("beta_initializer", "gamma_initializer", "moving_mean_initializer", "moving_variance_initializer"):
        own = getattr(layer, name)
        translated = initializers.of_keras(own, tuple(layer.moving_mean.shape))
        if translated is not own:
            found[name] = keras.initializers.serialize(translated)
    return found


Translation = Callable[[dict[str, Any], str, keras.Layer | None], dict[str, Any]]
"""A function of the configuration, the name, and the layer itself where it is found."""


def _exchanged(
    model: keras.Model, old: tuple[type[keras.Layer], ...], new: type[keras.Layer], translate: Translation
) -> keras.Model:
    """Return `model` with layers of exactly the classes `old` exchanged for `new`."""
    headers = [_header(kind) for kind in old]

    def copy(operation: Operation) -> Operation:
        if type(operation) in old:
            return new.from_config(translate(_config_of(operation), operation.name, operation))
        if not isinstance(operation, keras.Layer) or not _holds(operation, old):
            return copy_layer(operation)
        config = _config_of(operation)
        inside = {layer.name: layer for layer in operation._flatten_layers() if type(layer) in old}
        rewritten = _rewritten(config, headers, new, lambda config, name, _: translate(config, name, inside.get(name)))
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


def _config_of(layer: keras.Layer) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The object being serialized includes a `lambda`")  # replaced below
        return dict(layer.get_config())


def _holds(layer: keras.Layer, kinds: tuple[type[keras.Layer], ...]) -> bool:
    return any(type(inner) in kinds for inner in layer._flatten_layers(include_self=False))


def _rewritten(config: Any, headers: list[dict[str, Any]], new: type[keras.Layer], translate: Translation) -> Any:
    """Return a configuration with the batch normalizations inside it exchanged."""
    if isinstance(config, list | tuple):
        return type(config)(_rewritten(item, headers, new, translate) for item in config)
    if not isinstance(config, dict):
        return config
    if any(header.items() <= config.items() for header in headers):
        inner = translate(config["config"], config["config"]["name"], None)
        return {**config, **_header(new), "config": inner}
    return {key: _rewritten(value, headers, new, translate) for key, value in config.items()}


def _header(kind: type[keras.Layer]) -> dict[str, Any]:
    serialized = keras.saving.serialize_keras_object(kind(name="header"))
    return {key: serialized[key] for key in ("module", "class_name", "registered_name")}


def _compile_alike(model: keras.Model, copy: keras.Model) -> None:
    """Compile `copy` like `model`, and let its optimizer continue where that of `model` stands."""
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
