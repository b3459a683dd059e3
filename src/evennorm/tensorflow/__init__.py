"""Normalize TensorFlow tensors eagerly, in tf.function and under XLA."""

from __future__ import annotations

import numpy as np

from evennorm.core.call import Call
from evennorm.core.engine import Engine
from evennorm.core.moments import Moments
from evennorm.errors import MissingExtra
from evennorm.kernels import choose
from evennorm.kernels.parts import warn_once

try:
    import tensorflow as tf
except ImportError as error:
    raise MissingExtra("evennorm.tensorflow", "tensorflow", error.name) from error

from evennorm.tensorflow import compiled, composed, replicas
from evennorm.tensorflow.namespace import Tensor, xp

__all__ = ["Moments", "batch_norm", "engine", "normalize", "synchronized"]


def __dir__() -> list[str]:
    """Return the names of the public API."""
    return sorted(__all__)


def _device() -> str:
    """Return "cpu" where TensorFlow sees no other device. Tracing a graph does not tell which of several devices will run
    it."""
    others = [device.device_type for device in tf.config.get_visible_devices() if device.device_type != "CPU"]
    return others[0].lower() if others else "cpu"


def _train(
    call: Call,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Moments]:
    kernel = choose("tensorflow", x.dtype.name, compiled=compiled.supports(x, gamma, beta, residual), device=_device())
    if not compiled.AVAILABLE:
        warn_once("tensorflow")
    if kernel == "cpu" and mask is None and call.activation.slope >= 0:
        return compiled.train(call, x, gamma, beta, residual)
    return composed.train(call, x, gamma, beta, residual, mask)


def _train_synchronized(
    call: Call,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Moments]:
    return (replicas.train if replicas.several() else _train)(call, x, gamma, beta, residual, mask)


class _TensorFlowEngine(Engine):
    def at_hand(self, value: Tensor) -> np.ndarray | None:
        return value.numpy() if hasattr(value, "numpy") else None

    @property
    def device(self) -> str:
        """The name of the device, as `kernels.choose` takes it."""
        return _device()


engine = _TensorFlowEngine("tensorflow", xp, _train)
synchronized = _TensorFlowEngine("tensorflow", xp, _train_synchronized)
"""The same engine with statistics taken over all replicas of the current tf.distribute strategy."""
batch_norm = engine.batch_norm
normalize = engine.normalize
