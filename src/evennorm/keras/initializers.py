"""Translate Keras 1's initializers to objects that Keras 3 accepts and saves."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import prod, sqrt
from typing import Any

import keras
import numpy as np

from evennorm.errors import ArgumentError

_RENAMED = {"zero": "zeros", "one": "ones", "zeros": "zeros", "ones": "ones"}
_SAME: dict[str, Callable[[int | None], keras.initializers.Initializer]] = {
    "uniform": lambda seed: keras.initializers.RandomUniform(-0.05, 0.05, seed=seed),
    "normal": lambda seed: keras.initializers.RandomNormal(0.0, 0.05, seed=seed),
}
"""Initializers that Keras 3 has under other names: a model that uses them is loaded without evennorm."""


def from_keras_1(value: Any, name: str) -> Any:
    """Return an old initializer for a vector of weights called `name`.

    Raises:
        ArgumentError: a name that Keras 1 did not know.
    """
    if isinstance(value, str):
        if value in _RENAMED:
            return keras.initializers.get(_RENAMED[value])
        return _SAME[value](None) if value in _SAME else Keras1Initializer(value)
    if isinstance(value, keras.initializers.Initializer) or not callable(value):
        return keras.initializers.get(value)
    return Keras1Callable(value, name)


def of_keras(value: Any, shape: tuple[int, ...]) -> Any:
    """Return an initializer for weights of this shape that Keras alone can load, of the same distribution.

    What no initializer of Keras draws (orthogonal, a callable of Keras 1's form) becomes the values themselves.
    """
    if not isinstance(value, Keras1Initializer | Keras1Callable):
        return value
    if isinstance(value, Keras1Initializer):
        if value.name in _SAME:
            return _SAME[value.name](value.given_seed)
        if value.name in _SQUARED_LIMIT:
            limit = sqrt(_SQUARED_LIMIT[value.name] / _fan(shape))
            return keras.initializers.RandomUniform(-limit, limit, seed=value.given_seed)
        if value.name in _VARIANCE:
            return keras.initializers.RandomNormal(0.0, sqrt(_VARIANCE[value.name] / _fan(shape)), seed=value.given_seed)
    return keras.initializers.Constant(keras.ops.convert_to_numpy(value(shape)).tolist())


Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _fan(shape: tuple[int, ...]) -> float:
    """Return Keras 1's fan of a vector: the square root of its size, both in and out."""
    return sqrt(prod(shape))


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], limit: float) -> np.ndarray:
    return rng.uniform(-limit, limit, shape)


def _uniform_within(squared: float) -> Draw:
    return lambda rng, shape: _uniform(rng, shape, sqrt(squared / _fan(shape)))


def _normal_of(variance: float) -> Draw:
    return lambda rng, shape: rng.normal(0.0, sqrt(variance / _fan(shape)), shape)


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return an orthogonal vector: as a matrix of one column, its only orthonormal column is a unit vector; 1.1 is Keras 1's
    scale."""
    column = rng.normal(size=shape)
    return 1.1 * column / np.linalg.norm(column)


_SQUARED_LIMIT = {"lecun_uniform": 3, "glorot_uniform": 3, "he_uniform": 6}
_VARIANCE = {"glorot_normal": 1, "he_normal": 2}
"""Both times _fan."""


_DRAW: dict[str, Draw] = {
    "uniform": lambda rng, shape: _uniform(rng, shape, 0.05),
    "normal": lambda rng, shape: rng.normal(0.0, 0.05, shape),
    **{name: _uniform_within(squared) for name, squared in _SQUARED_LIMIT.items()},
    **{name: _normal_of(variance) for name, variance in _VARIANCE.items()},
    "orthogonal": _orthogonal,
}


@keras.saving.register_keras_serializable(package="evennorm")
class Keras1Initializer(keras.initializers.Initializer):
    """One of Keras 1's named random initializers, with its distribution on a vector.

    Args:
        name: uniform, normal, lecun_uniform, glorot_uniform, glorot_normal, he_uniform, he_normal or orthogonal.
        seed: drawn from Python's generator, which keras.utils.set_random_seed seeds, where it is None.

    Source: Keras 1.2.2, keras/initializations.py.
    """

    def __init__(self, name: str, seed: int | None = None):
        if name == "identity":
            raise ArgumentError(
                "identity fills a square matrix, and gamma and beta are vectors (Keras 1 refused it too); "
                "received 'identity'; 'one' and 'zero' are the usual choices"
            )
        if name not in _DRAW:
            known = ", ".join(sorted([*_RENAMED, *_DRAW]))
            raise ArgumentError(f"beta_init and gamma_init take one of {known}, or a callable; received {name!r}")
        self.name = name
        # Python's generator is what Keras seeds its own initializers from: keras.utils.set_random_seed governs both.
        self.given_seed, self.seed = seed, random.randint(1, 10**9) if seed is None else seed

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        return keras.ops.convert_to_tensor(_DRAW[self.name](np.random.default_rng(self.seed), tuple(shape)), dtype)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.given_seed}  # a seed that was not given is left out, as in Keras


@keras.saving.register_keras_serializable(package="evennorm")
class Keras1Callable(keras.initializers.Initializer):
    """A callable of Keras 1's form, `f(shape, name=...)`, returning an array, a tensor or a variable."""

    def __init__(self, function: Callable[..., Any], name: str):
        self.function = keras.saving.deserialize_keras_object(function) if isinstance(function, dict) else function
        self.name = name

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        value = keras.ops.convert_to_tensor(self.function(tuple(shape), name=self.name), dtype)
        if tuple(value.shape) != tuple(shape):
            raise ArgumentError(
                f"{self.name}_init was asked for an array of shape {tuple(shape)}; it returned one of {tuple(value.shape)}"
            )
        return value

    def get_config(self) -> dict[str, Any]:
        return {"function": keras.saving.serialize_keras_object(self.function), "name": self.name}
