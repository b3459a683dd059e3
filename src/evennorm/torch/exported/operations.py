"""Find the operation that a program names: one of torch's own on tensors, or arithmetic on sizes."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from evennorm.torch.exported.values import UnreadError

_ATEN = re.compile(r"torch\.ops\.aten\.([a-z_]\w*)\.(\w+)", re.IGNORECASE)
_ON_SIZES: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "eq", "ne", "lt", "le", "gt", "ge")
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite")
    },
}
CHECKS = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}
"""Operations that only test what torch.export took for granted."""

CORE = {
    "convolution": "a convolution",
    "addmm": "a linear layer",
    "mm": "a linear layer",
    "native_layer_norm": "layer normalization",
    "native_group_norm": "group normalization",
    **{f"_native_batch_norm_legit{end}": "batch normalization" for end in ("", "_no_training", "_functional")},
    "_batch_norm_no_update": "batch normalization",
    "_batch_norm_with_update": "batch normalization",
}
"""What stands for a layer after run_decompositions."""


def operation(target: str) -> Callable[..., Any]:
    """Return the operation of that name.

    Raises:
        UnreadError: another name. A lookup of any name in torch would reach functions that run commands and write files.

    Example:
        >>> operation("_operator.add")(2, 3)
        5
    """
    if target in _ON_SIZES:
        return _ON_SIZES[target]
    named = _ATEN.fullmatch(target)
    found = getattr(getattr(torch.ops.aten, named[1], None), named[2], None) if named else None
    if not isinstance(found, torch._ops.OpOverload) or not _is_of_tensors(found):
        raise UnreadError(f"the operation {target!r}, which is none of torch's own on tensors")
    return found


def _is_of_tensors(found: torch._ops.OpOverload) -> bool:
    arguments, returns = found._schema.arguments, found._schema.returns
    # aten::from_file maps a file, and aten::save writes one.
    return bool(returns or name_of(found) in CHECKS) and not any(each.name == "filename" for each in arguments)


def name_of(found: Any) -> str:
    """Return the name of an operation without its overload, "add" for aten.add.Tensor; "" for arithmetic on sizes."""
    return str(found._schema.name.partition("::")[2]) if isinstance(found, torch._ops.OpOverload) else ""


def is_random(found: Any) -> bool:
    """Return whether an operation draws random numbers."""
    return isinstance(found, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in found.tags


def bound(found: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by their names, those that were left out by their defaults.

    Example:
        >>> bound(torch.ops.aten.leaky_relu.default, ("x",), {})["negative_slope"]
        0.01
    """
    names = [each.name for each in found._schema.arguments]
    defaults = {each.name: each.default_value for each in found._schema.arguments if each.has_default_value()}
    return defaults | dict(zip(names, args, strict=False)) | kwargs
