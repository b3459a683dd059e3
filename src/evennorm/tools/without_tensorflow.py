"""Keep Keras on another engine from importing TensorFlow only to ask whether something is one of its types."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

_ASKING = ("keras.src.saving.serialization_lib", "keras.src.legacy.saving.json_utils", "keras.src.utils.rng_utils")
"""Modules of Keras that look at types of TensorFlow wherever it is installed. Layers that compute by it are elsewhere."""


class _IfLoaded:
    """TensorFlow as Keras's checks see it: there only if somebody has loaded it."""

    def __init__(self, lazy: Any) -> None:
        self._lazy = lazy

    @property
    def available(self) -> bool:
        return "tensorflow" in sys.modules and self._lazy.available

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lazy, name)


def leave_tensorflow_out() -> None:
    """Save seconds, memory and TensorFlow's log lines; does nothing where Keras runs on TensorFlow.

    A process that has not loaded TensorFlow has no object of its types, so that Keras's answers stay the same.
    """
    import keras

    if keras.config.backend() == "tensorflow":
        return
    for name in _ASKING:
        try:
            module: Any = import_module(name)
        except ImportError:  # another Keras
            continue
        if hasattr(module, "tf") and not isinstance(module.tf, _IfLoaded):
            module.tf = _IfLoaded(module.tf)
