"""Provide Flax's BatchNorm with the same arguments, variables and numbers, and additions: for nnx here, for linen in a
submodule.

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
    """Return the names of the public API."""
    return sorted(__all__)
