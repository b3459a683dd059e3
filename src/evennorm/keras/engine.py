"""The name of Keras's backend goes in; the framework module that computes for it comes out."""

from __future__ import annotations

from importlib import import_module

import keras

from evennorm.core.engine import Engine
from evennorm.errors import ArgumentError

ENGINES = ("jax", "torch", "tensorflow", "numpy")


def current_engine() -> Engine:
    """The engine of the backend that Keras runs on.

    Raises:
        ArgumentError: a backend that evennorm has no framework module for.
    """
    name = keras.backend.backend()
    if name not in ENGINES:
        raise ArgumentError(
            f"evennorm.keras runs on the Keras backends {', '.join(ENGINES)}; received {name!r}; choose one by KERAS_BACKEND"
        )
    return import_module(f"evennorm.{name}").engine


def synchronized_engine() -> Engine:
    """The engine whose statistics are taken over all replicas, which Keras has on TensorFlow."""
    from evennorm.tensorflow import synchronized

    return synchronized
