"""Provide Flax's BatchNorm by its arguments, variables and numbers, and more than it does: for nnx here, for linen beside.

`evennorm.flax.linen.BatchNorm` is the one for linen.
"""

from __future__ import annotations

from evennorm.errors import MissingExtra

try:
    from flax import nnx as _nnx  # noqa: F401
except ImportError as error:
    raise MissingExtra("evennorm.flax", "flax", error.name) from error

from evennorm.flax import linen
from evennorm.flax.conversion import convert, revert
from evennorm.flax.modules import BatchNorm
from evennorm.jax.nnx import read_states, write_states

__all__ = ["BatchNorm", "convert", "linen", "read_states", "revert", "write_states"]


def __dir__() -> list[str]:
    """Names of the public API."""
    return sorted(__all__)
