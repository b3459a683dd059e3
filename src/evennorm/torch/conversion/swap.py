"""Change a module's class to one made of a mixin and its own, and change it back.

The object stays the same, and with it parameters, buffers, hooks, flags and whatever else hangs on it. torch.nn does so too,
for lazy modules and parametrizations.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn


class Swapped(nn.Module):
    """The base of mixins. A copied or pickled module comes back with the same mixin."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if not made_of(cls):  # a user's class may keep a list of those derived from it, where ours have no place
            super().__init_subclass__(**kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, original, *others = made_of(type(self))
        return _made, (mixin, original, *others), self.__getstate__()


def derived(mixin: type[nn.Module], original: type[nn.Module], *others: type[nn.Module]) -> type[nn.Module]:
    """Return the class with these bases, named like `original`; the same one for the same bases."""
    bases = (mixin, original, *others)
    for known in original.__subclasses__():
        if known.__dict__.get("_evennorm_bases") == bases:
            return known
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_evennorm_bases": bases,
    }
    return types.new_class(original.__name__, bases, {}, lambda body: body.update(namespace))


def swap(module: nn.Module, mixin: type[nn.Module], *others: type[nn.Module]) -> None:
    module.__class__ = derived(mixin, original_class(module), *others)


def swap_back(module: nn.Module) -> None:
    module.__class__ = original_class(module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module had before."""
    bases = made_of(type(module))
    return bases[1] if bases else type(module)


def made_of(kind: type) -> tuple[type[nn.Module], ...]:
    """Return mixin, original class and other bases of a class that `derived` made; nothing for any other."""
    return kind.__dict__.get("_evennorm_bases", ())


def _made(mixin: type[nn.Module], original: type[nn.Module], *others: type[nn.Module]) -> nn.Module:
    kind: Any = derived(mixin, original, *others)
    return kind.__new__(kind)
