"""Find the framework module behind the name of Keras's backend."""

from __future__ import annotations

from importlib import import_module

import keras

from evennorm.core.engine import Engine
from evennorm.errors import ArgumentError

ENGINES = ("jax", "torch", "tensorflow", "numpy")
EXCHANGING = ("jax", "torch", "tensorflow")
"""Backends whose devices can take the statistics of a batch together."""


def current_engine() -> Engine:
    """Return the engine of the backend that Keras runs on.

    Raises:
        ArgumentError: a backend that evennorm has no framework module for.
    """
    name = keras.backend.backend()
    if name not in ENGINES:
        raise ArgumentError(
            f"evennorm.keras runs on the Keras backends {', '.join(ENGINES)}; received {name!r}; choose one by KERAS_BACKEND"
        )
    return import_module(f"evennorm.{name}").engine


def check_synchronized() -> None:
    """Refuse `synchronized=True` where Keras's backend has no devices to exchange with.

    Raises:
        ArgumentError: the backend is none of those that train.
    """
    name = keras.backend.backend()
    if name not in EXCHANGING:
        raise ArgumentError(
            f"synchronized=True takes the statistics of all devices together on the Keras backends {', '.join(EXCHANGING)}; "
            f"received the backend {name!r}; choose another by KERAS_BACKEND, or leave out synchronized"
        )


def synchronized_engine() -> Engine:
    """Return the engine whose statistics are taken over all devices.

    Raises:
        ArgumentError: JAX computes each device's part of the batch as a program of its own.
    """
    name = keras.backend.backend()
    if name == "jax":
        _refuse_parts()
        return current_engine()
    if name == "tensorflow":
        return import_module("evennorm.tensorflow").synchronized
    return import_module("evennorm.torch.synchronized").engine


def replicas_apart() -> int:
    """Return how many replicas normalize parts of a batch, each by its own statistics, where nothing synchronizes them.

    On JAX, arrays that lie on many devices are normalized as one.
    """
    if keras.backend.backend() != "tensorflow":
        return 1
    return int(import_module("evennorm.tensorflow.replicas").number())


def _refuse_parts() -> None:
    axes = import_module("evennorm.jax.parts").axes()
    if axes:
        raise ArgumentError(
            "synchronized=True normalizes the whole batch, and under shard_map and pmap a layer sees one device's part; "
            f"received a call under the axes {', '.join(map(repr, axes))}; spread arrays by keras.distribution instead"
        )
