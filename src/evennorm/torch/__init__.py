"""Normalize torch tensors, with support for autograd, double backward and torch.compile."""

from evennorm.errors import MissingExtra

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingExtra("evennorm.torch", "torch", error.name) from error

from evennorm.core.moments import Moments
from evennorm.torch.backend import batch_norm, engine, normalize
from evennorm.torch.conversion import convert, report, revert
from evennorm.torch.lazy import LazyBatchNorm1d, LazyBatchNorm2d, LazyBatchNorm3d
from evennorm.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from evennorm.torch.monitor import monitor
from evennorm.torch.placement import place
from evennorm.torch.recompute import recompute_outputs
from evennorm.torch.states import read_states, write_states
from evennorm.torch.sync_batch_norm import SyncBatchNorm
from evennorm.torch.tune import tune

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "Moments",
    "SyncBatchNorm",
    "batch_norm",
    "convert",
    "engine",
    "monitor",
    "normalize",
    "place",
    "read_states",
    "recompute_outputs",
    "report",
    "revert",
    "tune",
    "write_states",
]


def __dir__() -> list[str]:
    """Return the names of the public API."""
    return sorted(__all__)
