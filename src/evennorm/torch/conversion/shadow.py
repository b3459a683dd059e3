"""Copy a module so that its forward can be traced without harm to the original."""

from __future__ import annotations

from typing import Any

from torch import nn

from evennorm.torch.conversion.swap import Swapped, derived, original_class
from evennorm.torch.conversion.untraceable import Untraceable

_CONTAINERS = (list, dict, set)


class _Watched(Swapped):
    """A mixin for the class of a module that is traced: it notes what is read and refuses writes."""

    def __getattribute__(self, name: str) -> Any:
        object.__getattribute__(self, "__dict__")["_evennorm_reads"].add(name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Untraceable(f"sets self.{name}")

    def __delattr__(self, name: str) -> None:
        raise Untraceable(f"deletes self.{name}")


def shadow_of(module: nn.Module, training: bool, reads: set[str]) -> nn.Module:
    """Return a module with the same content that may be run without harm to the original."""
    kind = derived(_Watched, original_class(module))
    shadow = object.__new__(kind)
    content = object.__getattribute__(shadow, "__dict__")
    content.update({key: value.copy() if type(value) in _CONTAINERS else value for key, value in module.__dict__.items()})
    content.update(training=training, _evennorm_reads=reads)
    return shadow


def check_kept(module: nn.Module, shadow: nn.Module) -> None:
    """Check that the forward of the shadow has not changed a list or the like.

    Raises:
        Untraceable: the forward of the shadow has put something into a list or the like.
    """
    after = object.__getattribute__(shadow, "__dict__")
    for key, before in module.__dict__.items():
        if type(before) in _CONTAINERS and [*map(id, before)] != [*map(id, after[key])]:
            raise Untraceable(f"changes self.{key}")
