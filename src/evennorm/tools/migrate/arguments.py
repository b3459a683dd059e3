"""Translate initializers, regularizers, constraints and activations of Keras 1 and 2 to Keras 3's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from evennorm.errors import InputError
from evennorm.keras import arguments

SLOPE = 1.2
"""Keras 3's hard_sigmoid is clip(x / 6 + 0.5), that of Keras 1 and 2 clip(0.2 x + 0.5): the same of 1.2 x."""

ACTIVATIONS = {
    name: name
    for name in (
        "linear", "relu", "relu6", "tanh", "sigmoid", "softmax", "softplus", "softsign", "elu", "selu", "exponential",
        "gelu", "hard_sigmoid", "log_softmax", "silu",
    )
} | {"swish": "silu"}  # fmt: skip

_INITIALIZERS: dict[str, Any] = {
    "zero": "zeros",
    "one": "ones",
    "uniform": {"class_name": "RandomUniform", "config": {"minval": -0.05, "maxval": 0.05}},
    "normal": {"class_name": "RandomNormal", "config": {"mean": 0.0, "stddev": 0.05}},
}
_CONSTRAINTS = {"m": "max_value", "low": "min_value", "high": "max_value"}


def activation(value: Any, layer: str) -> str:
    """Return the name of an activation in Keras 3.

    Raises:
        InputError: one that neither knew; the model cannot predict without it.
    """
    if isinstance(value, Mapping):
        named = value.get("config") if value.get("class_name") == "function" else value.get("class_name")
        value = str(named).lower()
    if value is None:
        return "linear"
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise InputError(
            f"{layer!r} applies the activation {value!r}, which is no function of Keras and whose code is not in the file; "
            "rebuild that layer in Keras 3"
        )
    return ACTIVATIONS[value]


class Translation:
    """A translator of one layer's arguments that act in training only; it notes those without a counterpart."""

    def __init__(self, assumed: list[str]):
        self._assumed = assumed

    def initializer(self, value: Any, default: str) -> Any:
        value = _INITIALIZERS.get(value, value) if isinstance(value, str) else value
        if isinstance(value, Mapping) and value.get("class_name") == "VarianceScaling":
            config = dict(value["config"])
            if config.get("distribution") == "normal":
                config["distribution"] = "truncated_normal"
            value = {"class_name": "VarianceScaling", "config": config}
        return self._tried("initializer", keras.initializers.get, value, default)

    def regularizer(self, value: Any) -> Any:
        if isinstance(value, Mapping) and "name" in value:
            value = {**value, "name": "L1L2Regularizer"} if value["name"] == "ActivityRegularizer" else value
            penalty = {key: x for key, x in value.items() if key != "name"}
            if set(penalty) <= {"l1", "l2"} and not any(penalty.values()):
                return None
        return self._tried("regularizer", arguments.regularizer, value, None)

    def constraint(self, value: Any) -> Any:
        if isinstance(value, Mapping) and "name" in value:
            config = {_CONSTRAINTS.get(key, key): x for key, x in value.items() if key != "name"}
            value = {"class_name": str(value["name"]), "config": config}
        if isinstance(value, str):
            value = {"maxnorm": "max_norm", "nonneg": "non_neg", "unitnorm": "unit_norm"}.get(value, value)
        return self._tried("constraint", keras.constraints.get, value, None)

    def _tried(self, what: str, read: Any, value: Any, default: Any) -> Any:
        if value is None:
            return read(default) if default is not None else None
        try:
            return read(value)
        except Exception:  # Keras may raise anything for a name or a dict; predictions do not depend on it
            name = value if isinstance(value, str) else value.get("class_name", value.get("name", value))
            self._assumed.append(f"{what} {name!r} has no counterpart in Keras 3 and is left out; only training uses it")
            return read(default) if default is not None else None

    def common(self, config: Mapping[str, Any], *kinds: str) -> dict[str, Any]:
        """Return initializer, regularizer and constraint of each of `kinds` of weight, and of the output."""
        defaults = {"kernel": "glorot_uniform", "recurrent": "orthogonal", "bias": "zeros"}
        new: dict[str, Any] = {}
        for kind in kinds:
            new[f"{kind}_initializer"] = self.initializer(
                config.get(f"{kind}_initializer"), defaults.get(kind, "glorot_uniform")
            )
            new[f"{kind}_regularizer"] = self.regularizer(config.get(f"{kind}_regularizer"))
            new[f"{kind}_constraint"] = self.constraint(config.get(f"{kind}_constraint"))
        if config.get("activity_regularizer") is not None:
            new["activity_regularizer"] = self.regularizer(config["activity_regularizer"])
        return new
