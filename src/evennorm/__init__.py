"""Batch normalization you can see, trust and afford: one layer with one meaning on every engine."""

from evennorm.core.geometry import Geometry
from evennorm.core.state import BatchNormState
from evennorm.errors import ArgumentError, EvennormError, InputError, MissingExtra, ShapeError
from evennorm.kernels.buffers import set_buffer_limit
from evennorm.kernels.threads import num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BatchNormState",
    "EvennormError",
    "Geometry",
    "InputError",
    "MissingExtra",
    "ShapeError",
    "__version__",
    "num_threads",
    "set_buffer_limit",
    "set_num_threads",
]
