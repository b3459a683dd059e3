"""Keras models and tensors in and out: the layer, its placement in a model, and conversion from and to Keras's own."""

from evennorm.errors import MissingExtra

try:
    import keras as _keras  # noqa: F401
except ImportError as error:
    _extra = error.name if error.name in ("jax", "torch", "tensorflow") else "keras"  # Keras's engine may be what is missing
    raise MissingExtra("evennorm.keras", _extra, error.name) from error

from evennorm.keras import legacy
from evennorm.keras.convert import convert, revert
from evennorm.keras.layer import BatchNormalization
from evennorm.keras.place import place
from evennorm.keras.states import read_states, write_states

__all__ = ["BatchNormalization", "convert", "legacy", "place", "read_states", "revert", "write_states"]
