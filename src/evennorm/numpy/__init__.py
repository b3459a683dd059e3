"""Normalize NumPy arrays, compute moments and gradients, and merge moments of data larger than memory chunk by chunk."""

from evennorm.core.moments import Moments
from evennorm.core.normalize import Gradients
from evennorm.numpy.functional import batch_norm, engine, normalize
from evennorm.numpy.gradient import batch_norm_gradient
from evennorm.numpy.namespace import xp
from evennorm.numpy.streaming import merge, moments

__all__ = ["Gradients", "Moments", "batch_norm", "batch_norm_gradient", "engine", "merge", "moments", "normalize", "xp"]


def __dir__() -> list[str]:
    """Return the names of the public API."""
    return sorted(__all__)
