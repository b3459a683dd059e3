"""Provide batch normalization for Keras: the layer, its placement in a model, and conversion from and to Keras's own
layer."""

from importlib.util import find_spec as _find_spec

from evennorm.errors import MissingExtra

try:
    import keras as _keras  # noqa: F401
except ImportError as error:
    _backends, _absent = ("jax", "torch", "tensorflow"), (error.name or "keras").partition(".")[0]
    if _absent not in _backends:
        raise MissingExtra("evennorm.keras", "keras", _absent) from error
    # Keras's backend is missing: by default it is TensorFlow.
    _others = (f"set KERAS_BACKEND={name}, which is installed" for name in _backends if _find_spec(name) is not None)
    raise MissingExtra("evennorm.keras", _absent, _absent, next(_others, None)) from error

from evennorm.keras import legacy
from evennorm.keras.convert import convert, revert
from evennorm.keras.layer import BatchNormalization
from evennorm.keras.monitor import StatisticsMonitor
from evennorm.keras.place import place
from evennorm.keras.recalibrate import Recalibrate
from evennorm.keras.states import read_states, write_states

__all__ = [
    "BatchNormalization",
    "Recalibrate",
    "StatisticsMonitor",
    "convert",
    "legacy",
    "place",
    "read_states",
    "revert",
    "write_states",
]


def __dir__() -> list[str]:
    """Return the names of the public API."""
    return sorted(__all__)
