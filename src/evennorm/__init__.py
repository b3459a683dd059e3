"""Batch normalization you can see, trust and afford: one layer with one meaning on every framework.

`evennorm.equinox`, `evennorm.flax`, `evennorm.haiku`, `evennorm.jax`, `evennorm.keras`, `evennorm.numpy`,
`evennorm.tensorflow` and `evennorm.torch` load their frameworks, and do so when they are first asked for.

Example:
    >>> import evennorm
    >>> evennorm.numpy.moments([[1.0], [3.0]]).variance
    array([1.])
"""

from typing import TYPE_CHECKING

from evennorm.core.geometry import Geometry
from evennorm.errors import ArgumentError, EvennormError, InputError, MissingExtra, ShapeError, SynchronizationError
from evennorm.kernels.buffers import set_buffer_limit
from evennorm.kernels.threads import num_threads, set_num_threads
from evennorm.models.state import BatchNormState

__version__ = "1.0.0rc1"

__all__ = [
    "ArgumentError",
    "BatchNormState",
    "EvennormError",
    "Geometry",
    "InputError",
    "MissingExtra",
    "ShapeError",
    "SynchronizationError",
    "__version__",
    "num_threads",
    "set_buffer_limit",
    "set_num_threads",
]

if TYPE_CHECKING:
    from types import ModuleType

    from evennorm import equinox as equinox
    from evennorm import flax as flax
    from evennorm import haiku as haiku
    from evennorm import jax as jax
    from evennorm import keras as keras
    from evennorm import numpy as numpy
    from evennorm import tensorflow as tensorflow
    from evennorm import torch as torch
else:
    _FRAMEWORKS = ("equinox", "flax", "haiku", "jax", "keras", "numpy", "tensorflow", "torch")

    def __getattr__(name: str) -> "ModuleType":
        if name not in _FRAMEWORKS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return import_module(f"{__name__}.{name}")

    def __dir__() -> list[str]:
        """Return the names of the public API, with the submodules whose frameworks are installed."""
        from importlib.util import find_spec

        return sorted([*__all__, *(name for name in _FRAMEWORKS if find_spec(name) is not None)])
