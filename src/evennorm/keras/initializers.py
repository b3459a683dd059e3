"""Keras 1's initializers, by name or as a callable, go in; objects that Keras 3 accepts and saves come out."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import prod, sqrt
from typing import Any

import keras
import numpy as np

from evennorm.errors import ArgumentError

_RENAMED = {"zero": "zeros", "one": "ones", "zeros": "zeros", "ones": "ones"}


def from_keras_1(value: Any, name: str) -> Any:
    """An old initializer for a vector of weights called `name`.

    Raises:
        ArgumentError: a name that Keras 1 did not know.
    """
    if isinstance(value, str):
        return keras.initializers.get(_RENAMED[value]) if value in _RENAMED else Keras1Initializer(value)
    if isinstance(value, keras.initializers.Initializer) or not callable(value):
        return keras.initializers.get(value)
    return Keras1Callable(value, name)


def _fan(shape: tuple[int, ...]) -> float:
    """Keras 1 had no fans for a vector and took the square root of its size for both."""
    return sqrt(prod(shape))


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], limit: float) -> np.ndarray:
    return rng.uniform(-limit, limit, shape)


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A vector is a matrix of one column, whose only orthonormal column is a unit vector; 1.1 is Keras 1's scale."""
    column = rng.normal(size=shape)
    return 1.1 * column / np.linalg.norm(column)


_DRAW: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "uniform": lambda rng, shape: _uniform(rng, shape, 0.05),
    "normal": lambda rng, shape: rng.normal(0.0, 0.05, shape),
    "lecun_uniform": lambda rng, shape: _uniform(rng, shape, sqrt(3 / _fan(shape))),
    "glorot_uniform": lambda rng, shape: _uniform(rng, shape, sqrt(3 / _fan(shape))),
    "glorot_normal": lambda rng, shape: rng.normal(0.0, sqrt(1 / _fan(shape)), shape),
    "he_uniform": lambda rng, shape: _uniform(rng, shape, sqrt(6 / _fan(shape))),
    "he_normal": lambda rng, shape: rng.normal(0.0, sqrt(2 / _fan(shape)), shape),
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
        self.seed = random.randint(1, 10**9) if seed is None else seed

    def __call__(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        return keras.ops.convert_to_tensor(_DRAW[self.name](np.random.default_rng(self.seed), tuple(shape)), dtype)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.seed}


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
