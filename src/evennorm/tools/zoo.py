"""Build torch models of timm and torchvision by name, with fresh weights; nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from evennorm.errors import MissingExtra

LIBRARIES = ("timm", "torchvision")


def is_of_library(name: str) -> bool:
    """Return whether a model is named as in `timm:NAME` or `torchvision:NAME`.

    Example:
        >>> is_of_library("timm:resnet18"), is_of_library("nets:resnet18")
        (True, False)
    """
    library, _, rest = name.partition(":")
    return library in LIBRARIES and rest != ""


def maker(model: str, label: str = "", classes: int | None = None, channels: int | None = None) -> Callable[[], Any]:
    """Return the function that builds the model with fresh weights.

    Args:
        model: `timm:NAME` or `torchvision:NAME`.
        label: what errors call it; its name by default.
        classes: outputs; None is what the library chooses.
        channels: of its images; None is 3. torchvision's models take 3 only.

    Raises:
        MissingExtra: the library is not installed.
    """
    library, _, name = model.partition(":")
    try:
        found = import_module(library)
    except ImportError as error:
        raise MissingExtra(label or model, library, library) from error
    outputs = {} if classes is None else {"num_classes": classes}

    def of_timm() -> Any:
        return found.create_model(name, pretrained=False, **outputs, **({} if channels is None else {"in_chans": channels}))

    def of_torchvision() -> Any:
        parts = inspect.signature(found.models.get_model_builder(name)).parameters
        backbone = {"weights_backbone": None} if "weights_backbone" in parts else {}  # which would be downloaded
        return found.models.get_model(name, weights=None, **backbone, **outputs)

    return of_timm if library == "timm" else of_torchvision
