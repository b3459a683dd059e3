"""Tell whether a model belongs to PyTorch or to Keras before it is built, since Keras's engine is chosen first."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

from evennorm.tools.imported import imported, misnamed
from evennorm.tools.zoo import is_of_library

FRAMEWORKS = ("keras", "torch")
FUNCTION = re.compile(r"[\w.]+:\w+")


def framework_of(model: str) -> str:
    """Return "torch" for a .pt2 file, a model of timm or torchvision, and a function that returns a torch.nn.Module; else
    "keras".

    A function tells by its return annotation, a class by what it is derived from; else the module it is in, by what that
    imports.

    Raises:
        InputError: a function's module cannot be imported.

    Example:
        >>> framework_of("article-cnn"), framework_of("timm:resnet18")
        ('keras', 'torch')
    """
    if model.endswith((".pt2", ".pt", ".pth")) or is_of_library(model):
        return "torch"
    if not FUNCTION.fullmatch(model) or misnamed(model):
        return "keras"
    function = imported(model, f"--model {model}", f"function {model.partition(':')[2]!r}")
    told = _origin(getattr(function, "__annotations__", {}).get("return")) or (
        " ".join(kind.__module__ for kind in function.__mro__) if isinstance(function, type) else ""
    )
    if "keras" in told or "torch" in told:
        return "keras" if "keras" in told else "torch"
    if "nn.Module" in told:
        return "torch"
    names = {_home(value) for value in vars(sys.modules.get(getattr(function, "__module__", ""), sys)).values()}
    names |= set(getattr(getattr(function, "__code__", None), "co_names", ()))  # the module's own imports
    return "torch" if "torch" in names and "keras" not in names else "keras"


def _origin(annotation: Any) -> str:
    if isinstance(annotation, type):
        return " ".join(kind.__module__ for kind in annotation.__mro__)
    return str(annotation or "")


def _home(value: Any) -> str:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
    return str(name).split(".")[0]
