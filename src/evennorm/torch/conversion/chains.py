"""Run each batch normalization of an nn.Sequential together with the activation after it.

Every call looks up which modules follow each other: a Sequential may be indexed, sliced, extended and refilled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from evennorm.torch.conversion.steps import fused_by, is_watched, normalized, takes_more
from evennorm.torch.conversion.swap import Swapped, made_of, swap_back


class FusedSequential(Swapped):
    """A mixin for nn.Sequential, and for derived classes that run like it."""

    def forward(self, input: Any) -> Any:
        return chain(self._modules.values(), input)


def unfuse(module: nn.Module) -> None:
    """Restore the module's own forward."""
    if made_of(type(module))[:1] == (FusedSequential,):
        swap_back(module)


def chain(modules: Iterable[Any], x: Any) -> Any:
    """Call the modules one after the other, and return the last output."""
    line, place = list(modules), 0
    while place < len(line):
        module = line[place]
        follower = line[place + 1] if place + 1 < len(line) else None
        place += 1
        if fused_by(follower) is None or not (takes_more(module) or takes_more(last_of(module))):
            x = module(x)
            continue
        norm, x = (module, x) if takes_more(module) else unnormalized(module, x)
        x = normalized(norm, x, None, follower)
        place += 1
    return x


def unnormalized(module: nn.Module, x: Any) -> tuple[nn.Module | None, Any]:
    """Return the batch normalization that ends a module, and its input; where there is none, return None and the module's
    output."""
    if takes_more(module):
        return module, x
    if is_chain(module) and takes_more(last_of(module)) and not is_watched(module):
        *first, last = module._modules.values()
        return unnormalized(last, chain(first, x))
    return None, module(x)


def last_of(module: nn.Module | None) -> nn.Module | None:
    """Return the module whose output is the output of this one: itself, or the end of a chain."""
    while module is not None and is_chain(module) and len(module._modules) > 0:
        module = list(module._modules.values())[-1]
    return module


def is_chain(module: nn.Module) -> bool:
    """Return whether a module only passes its input from one submodule to the next."""
    kind = type(module)
    return (
        isinstance(module, nn.Sequential)
        and kind.forward in (nn.Sequential.forward, FusedSequential.forward)
        and kind.__iter__ is nn.Sequential.__iter__
    )
