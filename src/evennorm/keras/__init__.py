"""Keras models and tensors in and out: the layer, its placement in a model, and conversion from and to Keras's own."""

from evennorm.errors import MissingExtra

try:
    import keras as _keras  # noqa: F401
except ImportError as error:
    raise MissingExtra("evennorm.keras", "keras") from error

from evennorm.keras import legacy
from evennorm.keras.convert import convert, revert
from evennorm.keras.layer import BatchNormalization
from evennorm.keras.place import place
from evennorm.keras.states import read_states, write_states

__all__ = ["BatchNormalization", "convert", "legacy", "place", "read_states", "revert", "write_states"]
