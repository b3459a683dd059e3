"""Turn a batch normalization of torch into one of evennorm and back, or say why it has to stay.

The object stays the same and its class is exchanged, so that whoever holds it, its parameters or its hooks holds them on.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.nn.modules import batchnorm
from torch.nn.utils import parametrize

from evennorm.errors import ArgumentError
from evennorm.torch import arguments, lazy, modules
from evennorm.torch.conversion.swap import Swapped, derived, made_of, swap_back
from evennorm.torch.conversion.timm import NormAndActivation, is_like_timms
from evennorm.torch.sync_batch_norm import SyncBatchNorm

OURS: dict[type[nn.Module], type[nn.Module]] = {
    batchnorm.BatchNorm1d: modules.BatchNorm1d,
    batchnorm.BatchNorm2d: modules.BatchNorm2d,
    batchnorm.BatchNorm3d: modules.BatchNorm3d,
    batchnorm.LazyBatchNorm1d: lazy.LazyBatchNorm1d,
    batchnorm.LazyBatchNorm2d: lazy.LazyBatchNorm2d,
    batchnorm.LazyBatchNorm3d: lazy.LazyBatchNorm3d,
    batchnorm.SyncBatchNorm: SyncBatchNorm,
}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}
_COMPUTING = ("forward", "_check_input_dim", "__call__", "_call_impl")


class _Derived(Swapped):
    """A mixin for a user's class that derives from torch's and computes as torch's does."""


def is_ours(module: nn.Module) -> bool:
    return isinstance(module, modules._BatchNorm)


def obstacle(module: nn.Module) -> str:
    """Return why a batch normalization of torch has to stay one; "" if it can be exchanged."""
    kind = type(module)
    base = _base(kind)
    if base is None:
        return f"{kind.__name__} is derived from none of torch's layers"
    if parametrize.is_parametrized(module):
        return "its tensors are parametrized"
    if any(name not in module._parameters for name in ("weight", "bias")):
        return "its weight is made of others (weight_norm, spectral_norm, pruning)"
    if "forward" in module.__dict__:
        return "it has a forward of its own, set on the object"
    if getattr(module, "qconfig", None) is not None:
        return "it is prepared for quantization"
    own = [name for name in _COMPUTING if getattr(kind, name) is not getattr(base, name)]
    if own and not is_like_timms(module):
        return f"{kind.__name__} has a {own[0]} of its own"
    try:
        arguments.checked_momentum(module.momentum)
        arguments.checked_eps(module.eps)
        _successor(module)
    except Exception as error:  # a class may forbid, or do with classes derived from it, what it likes
        return str(error)
    return ""


def exchange(module: nn.Module) -> None:
    """Change the class of a batch normalization of torch, one without an obstacle, to evennorm's."""
    module.__class__ = _successor(module)
    module._configure(activation=None, negative_slope=0.01, alpha=1.0, virtual_batch_size=None, memory="save")


def restore(module: nn.Module) -> None:
    """Restore torch's class; a user's class derived from evennorm's stays."""
    kind = type(module)
    if kind in THEIRS:
        module.__class__ = THEIRS[kind]
    elif made_of(kind):
        swap_back(module)
    else:
        return
    for name in _additions():
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
        module.__dict__.pop(name, None)


def check_plain(module: Any, path: str) -> None:
    """Check that torch's module can do all that this one does.

    Raises:
        ArgumentError: the module does what torch's cannot.
    """
    foreign = {name: getattr(module, name) for name in ("activation", "virtual_batch_size")}
    given = ", ".join(f"{name}={value!r}" for name, value in foreign.items() if value is not None)
    if given:
        raise ArgumentError(
            f"torch.nn's batch normalization cannot do what {path or 'the model'!r} does with {given}; keep that layer, "
            "write the activation as a module of its own, or build it without"
        )


def _base(kind: type[nn.Module]) -> type[nn.Module] | None:
    return next((base for base in kind.__mro__ if base in OURS), None)


def _successor(module: nn.Module) -> type[nn.Module]:
    kind = type(module)
    if kind in OURS:
        return OURS[kind]
    mixin = NormAndActivation if is_like_timms(module) else _Derived
    return derived(mixin, kind, OURS[_base(kind) or kind])


@functools.cache
def _additions() -> frozenset[str]:
    """Return the attributes that a module of ours has and torch's has not."""
    ours, theirs = modules.BatchNorm1d(1), batchnorm.BatchNorm1d(1)
    return frozenset({*vars(ours), *ours._buffers} - {*vars(theirs), *theirs._buffers})
