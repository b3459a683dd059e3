"""Run a batch normalization with what follows it, in one step where the result is the same.

Whether it is the same is asked at every call: since the conversion modules may have been exchanged, or hooks put on them
that are to see the values in between, and a residual may need broadcasting or promotion.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import inf
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules import module as module_calls

from evennorm.core.activation import RELU, RELU6, Activation, activate
from evennorm.torch import export
from evennorm.torch.modules import _BatchNorm
from evennorm.torch.namespace import xp
from evennorm.torch.sync_batch_norm import SyncBatchNorm

Step: TypeAlias = nn.Module | Activation
"""A module, or the activation that a function computes."""


def normalized(
    norm: nn.Module | None,
    x: Any,
    residual: Any = None,
    activation: Step | None = None,
    inplace: bool = False,
    through: Sequence[nn.Module] = (),
) -> Any:
    """Compute activation(norm(x) + residual), or += with `inplace`; without `norm`, x is already normalized.

    `through` are modules that come directly after the normalization and did nothing when the model was converted.
    """
    if norm is not None and _in_one_step(norm, x, residual, activation) and all(map(does_nothing, through)):
        slope, limit = fused_by(activation) or (None, inf)
        return norm.forward(x, residual, slope=slope, limit=limit)  # no hook sees the call
    y = x if norm is None else norm(x)
    for each in through:
        y = each(y)
    if residual is not None:
        y = operator.iadd(y, residual) if inplace else y + residual
    if activation is None:
        return y
    if isinstance(activation, nn.Module):
        return activation(y)
    return activate(xp, y, activation)


def _in_one_step(norm: nn.Module, x: Any, residual: Any, activation: Step | None) -> bool:
    if not takes_more(norm) or is_watched(norm) or not isinstance(x, Tensor) or export.asked_for():
        return False
    fused = fused_by(activation)
    if activation is not None and (fused is None or is_watched(activation)):
        return False
    if norm.__dict__["memory"] == "inplace" and (
        residual is not None or fused in (RELU, RELU6)
    ):  # it could not invert these
        return False
    return residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.device == x.device
    )


def fused_by(step: Any) -> Activation | None:
    """Return the activation that a step computes; None for one that no kernel fuses."""
    kind = type(step)
    if kind is nn.ReLU:
        return RELU
    if kind is nn.LeakyReLU:
        return Activation(float(step.negative_slope))
    if kind in (nn.ReLU6, nn.Hardtanh) and (step.min_val, step.max_val) == (0, 6):
        return RELU6
    return step if kind is Activation else None


def does_nothing(module: Any) -> bool:
    return type(module) is nn.Identity and not is_watched(module)


def takes_more(module: Any) -> bool:
    """Return whether this is a batch normalization of ours that takes a residual and an activation in the call."""
    if not isinstance(module, _BatchNorm):
        return False
    forward = type(module).forward
    return (forward is _BatchNorm.forward or forward is SyncBatchNorm.forward) and module.__dict__["activation"] is None


def is_watched(module: Any) -> bool:
    """Return whether a hook sees what goes in and out of a module, or its call was replaced."""
    if not isinstance(module, nn.Module):
        return False
    own = module.__dict__  # reading nn.Module's attributes is slow, and this runs at every call
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
        or module_calls._has_any_global_hook()
    )
