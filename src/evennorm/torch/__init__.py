"""Torch tensors in, normalized torch tensors and their Moments out; autograd, double backward and torch.compile work."""

from evennorm.errors import MissingExtra

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingExtra("evennorm.torch", "torch") from error

from evennorm.core.moments import Moments
from evennorm.torch.functional import batch_norm, engine, normalize

__all__ = ["Moments", "batch_norm", "engine", "normalize"]
