"""Watch what the extension for torch is asked for, and go around it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from evennorm.torch import native


def watched(monkeypatch: pytest.MonkeyPatch, name: str) -> list[bool]:
    """For each call of this function of the extension, whether it computed."""
    calls: list[bool] = []
    function = getattr(native.extension, name)

    def computed(*given: Any) -> Any:
        found = function(*given)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(native, "extension", SimpleNamespace(**{**vars(native.extension), name: computed}))
    return calls


def through_python(function: Callable[[], Any]) -> Any:
    native.AVAILABLE = False
    try:
        return function()
    finally:
        native.AVAILABLE = True
