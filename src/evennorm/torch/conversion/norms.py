"""List the batch normalizations of a model with their paths, and which parts cannot be changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import batchnorm

from evennorm.errors import ArgumentError

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
_QUANTIZED = ("torch.ao.", "torch.nn.intrinsic", "torch.nn.qat", "torch.nn.quantizable", "torch.nn.quantized")


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield path, batch normalization, and why it cannot be changed, or "". One that is held in two places comes twice."""
    return _norms(model, "", "", ())


def _norms(module: nn.Module, path: str, why: str, around: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module, str]]:
    reason = closed(module)
    if reason:
        why = f"it is inside {path or 'the model'}, which {reason}"
    if isinstance(module, batchnorm._BatchNorm):
        yield path, module, why
    for name, child in module._modules.items():
        if child is not None and not any(child is each for each in around):  # a child may hold its parent
            yield from _norms(child, f"{path}.{name}" if path else name, why, (*around, module))


def closed(module: nn.Module) -> str:
    """Return why nothing may be changed in a module; "" if it may."""
    names = {kind.__name__ for kind in type(module).__mro__}
    wrapper = next((name for name in _WRAPPERS if name in names), None)
    if wrapper is not None:
        return f"is wrapped in {wrapper}"
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by TorchScript"
    if "OptimizedModule" in names:
        return "is compiled by torch.compile"
    if type(module).__module__.startswith(_QUANTIZED):
        return f"is a quantized {type(module).__name__}"
    return ""


def checked(model: Any, verb: str) -> nn.Module:
    """Return `model`, after checking that its modules may be changed.

    Raises:
        ArgumentError: no module, or one that is closed.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{verb} takes a torch.nn.Module; received {type(model).__name__}")
    reason = closed(model)
    if reason:
        raise ArgumentError(
            f"{verb} looks at a model before it is wrapped or compiled; received one that {reason}; {verb} the model "
            "inside, and wrap or compile the result"
        )
    return model
