"""Convert batch normalization with dropout and activation in one module: timm's BatchNormAct2d, recognized by name and
parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import batchnorm

from evennorm.torch import export
from evennorm.torch.conversion.steps import does_nothing, fused_by, is_watched
from evennorm.torch.conversion.swap import Swapped
from evennorm.torch.modules import _BatchNorm


def is_like_timms(module: nn.Module) -> bool:
    parts = (module._modules.get(name) for name in ("drop", "act"))
    named = any(kind.__name__ == "BatchNormAct2d" for kind in type(module).__mro__)
    return named and isinstance(module, batchnorm.BatchNorm2d) and all(isinstance(part, nn.Module) for part in parts)


class NormAndActivation(Swapped):
    """A mixin for that class and evennorm's BatchNorm2d."""

    def forward(self, x: Tensor) -> Any:
        if isinstance(x, Proxy):
            return export.one_node(self, x, None, None)
        fused = None if separate_part(self) is not None else fused_by(self.act)
        if fused is None:
            return self.act(self.drop(_BatchNorm.forward(self, x)))
        return _BatchNorm.forward(self, x, slope=fused.slope, limit=fused.limit)


def separate_part(module: nn.Module) -> nn.Module | None:
    """Return the part of such a module that prevents computing everything in one step."""
    if not does_nothing(module.drop):
        return module.drop
    return module.act if fused_by(module.act) is None or is_watched(module.act) else None
